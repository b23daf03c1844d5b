"""What the README and docs/ promise: code that runs, tables that are true, files and keys that exist."""
import re
import shlex

import pytest
import torch

import configurator
import model
from experiments.structures_table import structures_table
from structured import STRUCTURES, linear
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/*/README.md"))]


def blocks(text, language=""):
    """The contents of the fenced blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [contents for named, contents in found if named == language]


def commands():
    """Every command of the README that starts a program of this repository."""
    lines = [line.split("#")[0].strip() for block in blocks(README) for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL).replace("\n", " ")
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", prose)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith(("python ", "torchrun "))]


def test_the_example_of_one_layer_runs(capsys):
    (example,) = blocks(README, "python")
    exec(compile(example, "README.md", "exec"), {})
    assert "torch.Size([3072, 768])" in capsys.readouterr().out


def test_the_optimizer_of_ones_own_model_is_that_of_gpt():
    """docs/mup.md's example: the same learning rates and weight decay, experts' biases among them."""
    gpt = model.GPT(model.GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=16, struct="btt",
                                    num_experts=4, bias=True))
    (example,) = blocks((ROOT / "docs" / "mup.md").read_text(encoding="utf-8"), "python")
    names = dict(model=gpt, torch=torch)
    exec(compile(example, "mup.md", "exec"), names)
    made, truth = ({p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups
                    for p in group["params"]}
                   for optimizer in (names["optimizer"],
                                     gpt.configure_optimizers(0.1, 3e-3, (0.9, 0.95), "cpu", 128)))
    assert made == truth


def test_the_table_of_structures_is_what_the_program_prints():
    assert structures_table(768, 3072) in (ROOT / "docs" / "structures.md").read_text(encoding="utf-8")


def test_the_readmes_table_of_structures_is_true():
    rows = re.findall(r"^\| (\w+)[^|]*\| ([^|]*) \| ([\d.]+) \| ([^|]*) \|$", README, re.MULTILINE)
    assert {name for name, *_ in rows} == STRUCTURES.keys() - {"einsum"}
    fractions = {"½": "0.5", "¼": "0.25", "¾": "0.75"}
    for name, exponents, flops, taxonomy in rows:
        share = linear(name, 768, 3072).flops_per_token() / (2 * 768 * 3072)
        assert float(flops) == pytest.approx(share, abs=5e-4)
        theta = STRUCTURES[name]
        if theta is not None:
            numbers = [float(fractions.get(word, word)) for word in exponents.split()]
            assert numbers == list(theta)
            psi, nu, omega = (float(fractions.get(word, word)) for word in taxonomy.split(", "))
            assert (psi, nu, omega) == (theta.psi, theta.nu, theta.omega)


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_files_and_keys_of_a_command_exist(command):
    words = [word for word in shlex.split(command) if word != "..."]
    scripts = [ROOT / word for word in words if word.endswith(".py") and not word.startswith("out-")]
    assert all(script.is_file() for script in scripts), command
    if "-m" in words and (module := words[words.index("-m") + 1]) != "pytest":
        path = ROOT / module.replace(".", "/")
        module_file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert module_file.is_file(), command
        flags = flags_after(words, module)  # sweep and run take keys of train.py too
        assert flags <= {"help"} or flags <= keys_of(module_file) | keys_of(ROOT / "train.py"), command
    for script in (s for s in scripts if s.name in ("train.py", "sample.py")):
        assert flags_after(words, script.name) <= keys_of(script), command


def flags_after(words, program):
    after = words[words.index(program) + 1:]
    return {word.partition("=")[0].removeprefix("--") for word in after if word.startswith("--")}


def keys_of(script):
    return {*configurator.read_keys(str(script)), "help"}


def test_the_readme_names_enough_commands():
    assert len(set(commands())) >= 12  # else the test above would check nothing


def test_keys_that_are_said_to_matter_have_the_defaults_that_are_said():
    keys = configurator.read_keys(str(ROOT / "train.py"))
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \|[^|]*\|$", README, re.MULTILINE)
    assert len(rows) >= 8
    for names, defaults in rows:
        names = re.findall(r"\w+", names)
        assert set(names) <= keys.keys()
        for name, said in zip(names, defaults.split(", ")):
            default = keys[name].default
            if default is not None:
                assert configurator.parse(keys[name], said) == default, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for link, heading in re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
            assert not heading or heading in headings(page.parent / link), f"{link}#{heading}"


def headings(page):
    """The headings of a page, as links name them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


def test_the_file_map_names_everything_at_the_top():
    file_map = next(block for block in blocks(README) if block.startswith("train.py  "))
    named = {line.split()[0].rstrip("/") for line in file_map.splitlines() if not line.startswith(" ")}
    there = {path.name for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there <= named and all((ROOT / name).exists() for name in named)

"""experiments/structures_table.py: each cell of the table against the counted layer."""
import pytest
import torch

from experiments import structures_table as table_program
from experiments.structures_table import structures_table
from structured import STRUCTURES, LayerConfig, Structured, linear
from tests.structures import counted_flops

ROWS = {row[0]: row for row in ([cell.strip() for cell in line.split("|")[1:-1]]
                                for line in structures_table(96, 384).splitlines()[2:])}
NAMES = [name for name in STRUCTURES if name != "einsum"]


def test_every_structure_has_a_row():
    assert list(ROWS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_what_the_layer_has(name):
    _, theta, sizes, params, params_share, flops, flops_share, psi, nu, omega, cores = ROWS[name]
    layer = linear(name, 96, 384, weight_norm=False)
    weights = dict(layer.named_parameters())
    count = sum(p.numel() for p in weights.values())
    executed = counted_flops(lambda: layer(torch.randn(1, 96)))
    assert (int(params.replace(",", "")), int(flops.replace(",", ""))) == (count, executed)
    assert float(params_share) == pytest.approx(count / (96 * 384), abs=6e-4)
    assert float(flops_share) == pytest.approx(executed / (2 * 96 * 384), abs=6e-4)
    printed = dict(core.split(": ") for core in cores.split(", "))
    assert printed.keys() == weights.keys()
    for core, numbers in printed.items():
        std, lr = map(float, numbers.split(" · "))
        assert std == pytest.approx(layer.init_std(core), rel=6e-3)
        assert lr == pytest.approx(layer.lr_multipliers(128)[core], rel=6e-3)
    if STRUCTURES[name] is not None:
        assert tuple(float(v) for v in theta.split()) == STRUCTURES[name]


@pytest.mark.parametrize("name, psi, nu, omega", [
    ("dense", 1, 1, 0), ("monarch", 1, 0.5, 0), ("kronecker", 1, 0.5, 0.5), ("low_rank", 0.5, 0.5, 0),
    ("dyad", 1, 1, 0)])
def test_taxonomy_of_a_row(name, psi, nu, omega):
    assert [float(v) for v in ROWS[name][7:10]] == [psi, nu, omega]


def test_a_width_that_does_not_factor_has_its_reason_in_the_row():
    assert "97 does not split" in structures_table(97, 97)


@pytest.mark.parametrize("arguments", [[], ["768", "3072", "1"], ["x"], ["0"], ["64.5"]])
def test_the_program_wants_widths(arguments, run):
    done = run("experiments.structures_table", *arguments)
    assert done.returncode == 1 and "usage:" in done.stderr and not done.stdout


def test_the_program_prints_the_table(run):
    done = run("experiments.structures_table", "96", "384")
    assert done.returncode == 0 and done.stdout == structures_table(96, 384) + "\n"


class ThreeFactors(Structured):
    """What docs/structures.md says a structure of one's own is."""

    def __init__(self, d_in, d_out):
        shapes = dict(A=(1, 8, d_in), B=(1, 8, 8), C=(1, d_out, 8))
        fans = {name: (i, o) for name, (_, o, i) in shapes.items()}
        super().__init__(d_in, d_out, shapes, fans, LayerConfig())

    def flops_per_token(self):
        return 2 * 8 * (self.d_in + 8 + self.d_out)


def test_a_structure_of_ones_own_has_a_row(monkeypatch):
    """Its cost, and no taxonomy: that is of einsums."""
    monkeypatch.setitem(table_program.STRUCTURES, "three", None)
    monkeypatch.setattr(table_program, "linear", lambda name, d_in, d_out: ThreeFactors(d_in, d_out))
    row = table_program.row_of("three", 64, 32, 128)
    cells = dict(zip(table_program.HEAD, row))
    assert cells["parameters"] == "832" and cells["FLOPs/token"] == "1,664"
    assert cells["sizes"] == "A 1x8x64, B 1x8x8, C 1x32x8"
    assert cells["ψ"] == cells["ν"] == cells["ω"] == "nan"

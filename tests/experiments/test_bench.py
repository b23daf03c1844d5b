"""bench.py: what it counts and writes, never how fast anything is."""
import json

import pytest

import structured


def test_bench(run, tmp_path):
    told = run("experiments.bench", "--widths=32,64", "--tokens=96", "--turns=2", "--steps=2", "--n_embd=32", "--head_size=16",
                   "--n_layer=1", "--block_size=16", "--batch_size=2", f"--out={tmp_path}/results/b")
    assert told.returncode == 0, told.stderr
    result = json.loads((tmp_path / "results" / "b.json").read_text())
    names = ["dense", "low_rank", "kronecker", "monarch", "tt", "btt", "einsum", "dyad", "btt_moe"]
    assert [(r["width"], r["layer"]) for r in result["layers"]] == [(d, n) for d in (32, 64) for n in ["nn.Linear", *names]]
    rows = {(r["width"], r["layer"]): r for r in result["layers"]}
    for d in (32, 64):
        linear, dense = rows[d, "nn.Linear"], rows[d, "dense"]
        assert linear["ratio"] == linear["flops"] == linear["time_per_flop"] == dense["flops"] == 1
        # output, its gradient in x, and the gradient of the weight: nothing else is alive at the peak
        assert linear["peak_bytes"] == pytest.approx(4 * (2 * 96 * d + d * d), rel=0.05)
        assert dense["peak_bytes"] == pytest.approx(linear["peak_bytes"], rel=0.05)
        # the output, and for two factors z; no scratch
        assert linear["kept_bytes"] == dense["kept_bytes"] == 4 * 96 * d
        sizes = structured.linear("monarch", d, d).sizes
        assert rows[d, "monarch"]["kept_bytes"] == pytest.approx(4 * 96 * (d + sizes.gamma * sizes.phi), rel=0.2)
        # output, z, gradient in x, and two pieces of scratch, of which later runs have the memory already
        assert d == 32 or rows[d, "monarch"]["peak_bytes"] > 4 * 4.9 * 96 * d
        assert rows[d, "dyad"]["flops"] == 0.5 and rows[d, "btt_moe"]["flops"] > rows[d, "monarch"]["flops"]
    for row in result["layers"]:
        low, high = row["quartiles"]
        assert low <= row["ratio"] <= high and row["ms"] > 0 and row["peak_bytes"] > 0
        assert row["time_per_flop"] == pytest.approx(row["ratio"] / row["flops"])
        assert f"| {row['width']} | {row['layer']} | " in told.stdout
    assert [r["config"] for r in result["steps"]] == [*names, "moe"]
    assert all(r["tokens_per_s"] == pytest.approx(32 / r["ms"] * 1e3) for r in result["steps"])
    assert result["steps"][0]["speed"] == result["steps"][0]["flops"] == 1
    assert result["machine"]["threads"] == 1 and result["config"]["tokens"] == 96


@pytest.mark.parametrize("flags, word", [(["--structs=bt"], "'bt'"), (["--turns=0"], "turns"), (["--device=nothing"], "nothing"),
                                         (["--widths=97,", "--structs=btt"], "97"), (["--dtype=int8"], "int8")])
def test_bench_refuses(run, tmp_path, flags, word):
    told = run("experiments.bench", *flags, "--tokens=8", "--step=False", f"--out={tmp_path}/b")
    assert told.returncode == 1 and told.stderr.startswith("error: ") and word in told.stderr
    assert told.stderr.count("\n") == 1 and not (tmp_path / "b.json").exists()

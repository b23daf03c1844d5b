"""Logs as train.py writes them, of runs whose truth is known; and the cells of tables."""
import json


def write_log(folder, label, config, per_token, tokens, losses, ms=10.0, skipped=0, max_iters=None, **start):
    """A run of 1,000 tokens an iteration, the last ones skipped; start: more of its first line."""
    folder.mkdir(parents=True)
    config = dict(struct="dense", dataset="d", block_size=8, eval_iters=2, batch_size=4, decay_lr=False,
                  learning_rate=1e-3,
                  seed=1, n_layer=3, n_head=1, max_iters=max_iters or int(tokens[-1] // 1000)) | config
    lines = [dict(type="run", config=config, model_args=dict(vocab_size=96), params=config["n_embd"] ** 2,
                  active_params=config["n_embd"], flops_per_token=per_token, tokens_per_iter=1000,
                  flops_per_token_without_output_layer=per_token * 0.9) | start,
             dict(type="eval", iter=0, tokens=0, val_loss=4.6)]
    for t, loss in zip(tokens, losses):
        lines.append(dict(type="train", iter=int(t // 1000) - 1, tokens=t, loss=loss, ms_per_iter=ms))
        lines.append(dict(type="eval", iter=int(t // 1000), tokens=t, val_loss=loss))
    lines += [dict(type="skip", iter=int(tokens[-1] // 1000) + i, tokens=0, loss=None)
              for i in range(skipped)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps,
                                                    lines)) + '\n{"type": "eval", "it')    # a half line
    (folder / "settings.json").write_text(json.dumps(dict(label=label)))


def cells_of(text):
    """The cells of the markdown tables in a text, a list for each line."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("|")]

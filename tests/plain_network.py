"""The two-layer network once more, in plain torch and sender by sender: the truth that the tests compare with.

Every component's input is the sum of what each earlier component sends it, and `edge` may change any of these
messages. With `frozen`, patterns, norm scales and gates are those of another run, so that the network is linear.
"""

import math
from dataclasses import dataclass, field

import torch

from hijack_lens import Component


@dataclass
class Run:
    logits: torch.Tensor = None
    sent: dict = field(default_factory=dict)  # by sender: [batch, pos, d_model]
    patterns: dict = field(default_factory=dict)
    gates: dict = field(default_factory=dict)
    scales: dict = field(default_factory=dict)


def run(model, tokens, edge=None, frozen=None, bias_weight=1.0):
    """Runs the network; `edge(sender, receiver, via, message)` gives the message that arrives.

    `bias_weight` ([batch, pos, 1] or a number) multiplies every bias where it enters the residual stream.
    """
    edge = edge or (lambda sender, receiver, via, message: message)
    cfg, now = model.cfg, Run()
    w = {name: value.detach() for name, value in model.named_parameters()}
    length = tokens.shape[1]
    now.sent["embed"] = w["embed.W_E"][tokens]
    if "pos_embed.W_pos" in w:
        now.sent["pos_embed"] = w["pos_embed.W_pos"][:length].expand_as(now.sent["embed"])

    def received(receiver, via):
        return sum(edge(sender, receiver, via, message) for sender, message in now.sent.items())

    def normed(name, x, key):
        if cfg.normalization_type is None:
            return x
        if cfg.normalization_type.startswith("LN"):
            x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + cfg.eps).sqrt()
        now.scales[key] = scale
        return x / (scale if frozen is None else frozen.scales[key]) * w.get(f"{name}.w", 1.0)

    for layer in range(cfg.n_layers):
        at = f"blocks.{layer}"
        norm_bias = w.get(f"{at}.ln1.b", torch.zeros(cfg.d_model).to(cfg.dtype))
        attn = {name.rsplit(".", 1)[1]: value for name, value in w.items() if name.startswith(f"{at}.attn.")}
        heads = {}
        for index in range(cfg.n_heads):
            head = Component(layer, "head", index)
            if frozen is None:
                q, k = (
                    (normed(f"{at}.ln1", received(head, via), (head, via)) + norm_bias)
                    @ attn[f"W_{via.upper()}"][index]
                    + attn[f"b_{via.upper()}"][index]
                    for via in "qk"
                )
                scores = q @ k.mT
                for offset, key in enumerate(attn["W_R"][index] if "W_R" in attn else ()):
                    for t in range(offset, length):
                        scores[:, t, t - offset] += q[:, t] @ key
                causal = torch.ones(length, length, dtype=torch.bool).tril()
                scores = scores.masked_fill(~causal, -math.inf)
                if cfg.use_attn_scale:
                    scores = scores / math.sqrt(cfg.d_head)
                pattern = scores.softmax(-1)
            else:
                pattern = frozen.patterns[head]
            now.patterns[head] = pattern
            v = normed(f"{at}.ln1", received(head, "v"), (head, "v")) @ attn["W_V"][index]
            constant = norm_bias @ attn["W_V"][index] + attn["b_V"][index]
            heads[head] = (pattern @ v + bias_weight * constant) @ attn["W_O"][index]
        now.sent.update(heads)
        now.sent[f"b_O {layer}"] = bias_weight * attn["b_O"].expand_as(now.sent["embed"])

        if f"{at}.mlp.W_in" in w:
            mlp = Component(layer, "mlp")
            norm_bias = w.get(f"{at}.ln2.b", 0.0)
            before = normed(f"{at}.ln2", received(mlp, "mlp_in"), (mlp, "mlp_in")) @ w[f"{at}.mlp.W_in"]
            constant = norm_bias @ w[f"{at}.mlp.W_in"] if f"{at}.ln2.b" in w else 0.0
            before = before + bias_weight * (constant + w[f"{at}.mlp.b_in"])
            now.gates[mlp] = gate = _gate(cfg.act_fn, before)
            after = before * (gate if frozen is None else frozen.gates[mlp])
            now.sent[mlp] = after @ w[f"{at}.mlp.W_out"] + bias_weight * w[f"{at}.mlp.b_out"]

    last = normed("ln_final", received("unembed", "unembed"), "unembed") + bias_weight * w.get("ln_final.b", 0.0)
    now.logits = last @ w["unembed.W_U"] + bias_weight * w["unembed.b_U"]
    return now


def _gate(act, x):
    """The activation as x * gate(x)."""
    if act == "relu":
        return (x > 0).to(x)
    if act == "silu":
        return 1 / (1 + (-x).exp())
    if act == "gelu":
        return (1 + torch.erf(x / math.sqrt(2))) / 2
    raise ValueError(act)

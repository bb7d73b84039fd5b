"""GPT-2, GPT-NeoX and Llama once more, in plain torch from their weights: the truth for models of many families."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass
class Plain:
    """One network, its weights in TransformerLens's shapes and under its names.

    `rounds`: whether norms and patterns go through float32, as Hugging Face's Llama has it whatever the model's dtype.
    `angles`: the dtype in which rotary angles are worked out.
    """

    layers: list
    ends: dict
    n_heads: int
    act: str
    eps: float
    norm_type: str | None = "LN"
    parallel: bool = False
    rotary_dim: int = 0
    rounds: bool = False
    angles: torch.dtype = torch.float32

    def norm(self, x, name, w):
        if self.norm_type is None:
            return x
        if self.norm_type == "LN":
            x = x - x.mean(-1, keepdim=True)
        rough = x.float() if self.rounds else x
        x = (rough * torch.rsqrt(rough.square().mean(-1, keepdim=True) + self.eps)).to(x)
        return x * w[f"{name}.w"] + w.get(f"{name}.b", 0.0)

    def rotate(self, x):
        """Rotary positions, x being [batch, pos, head, d_head]."""
        if not self.rotary_dim:
            return x
        half = self.rotary_dim // 2
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, self.rotary_dim, 2, dtype=self.angles) / self.rotary_dim))
        angles = torch.arange(x.shape[1], dtype=self.angles)[:, None] * frequencies
        cos, sin = angles.cos().to(x)[:, None], angles.sin().to(x)[:, None]
        a, b = x[..., :half], x[..., half : self.rotary_dim]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., self.rotary_dim :]], -1)

    def run(self, tokens, at=None, receives=None):
        """Logits.

        `at(name, value)` is called with every activation, under TransformerLens's name for it, and returns what to go
        on with. `receives(receiver, via, stream)` returns the residual stream that one input reads: receivers are
        (layer, head) for "q", "k" and "v" (the first head of a group for its keys and values), (layer, None) for
        "mlp_in", and `None` for "unembed".
        """
        at = at or (lambda name, value: value)
        receives = receives or (lambda receiver, via, stream: stream)
        length = tokens.shape[1]
        x = at("hook_embed", self.ends["embed.W_E"][tokens])
        if "pos_embed.W_pos" in self.ends:
            x = x + at("hook_pos_embed", self.ends["pos_embed.W_pos"][:length].expand_as(x))
        for layer, w in enumerate(self.layers):
            block = f"blocks.{layer}"
            x = at(f"{block}.hook_resid_pre", x)
            made = {}
            for via in "QKV":
                n_made = len(w[f"attn.W_{via}"])
                heads = [
                    self.norm(receives((layer, i * self.n_heads // n_made), via.lower(), x), "ln1", w)
                    @ w[f"attn.W_{via}"][i]
                    for i in range(n_made)
                ]
                made[via] = torch.stack(heads, 2) + w.get(f"attn.b_{via}", 0.0)
                made[via] = at(f"{block}.attn.hook_{via.lower()}", made[via])
            q = at(f"{block}.attn.hook_rot_q", self.rotate(made["Q"]))
            k = at(f"{block}.attn.hook_rot_k", self.rotate(made["K"]))
            k, v = (kept.repeat_interleave(self.n_heads // kept.shape[2], 2) for kept in (k, made["V"]))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = at(f"{block}.attn.hook_attn_scores", scores.masked_fill(future, torch.finfo(x.dtype).min))
            pattern = (scores.float() if self.rounds else scores).softmax(-1).to(x)
            pattern = at(f"{block}.attn.hook_pattern", pattern)
            z = at(f"{block}.attn.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
            attn_out = torch.einsum("bqhd,hdm->bqm", z, w["attn.W_O"]) + w.get("attn.b_O", 0.0)
            attn_out = at(f"{block}.hook_attn_out", attn_out)
            mid = x if self.parallel else at(f"{block}.hook_resid_mid", x + attn_out)
            read = self.norm(receives((layer, None), "mlp_in", mid), "ln2", w)
            linear = read @ w["mlp.W_in"] + w.get("mlp.b_in", 0.0)
            if "mlp.W_gate" in w:
                gate = at(f"{block}.mlp.hook_pre", read @ w["mlp.W_gate"])
                post = ACTIVATIONS[self.act](gate) * at(f"{block}.mlp.hook_pre_linear", linear)
            else:
                post = ACTIVATIONS[self.act](at(f"{block}.mlp.hook_pre", linear))
            post = at(f"{block}.mlp.hook_post", post)
            mlp_out = at(f"{block}.hook_mlp_out", post @ w["mlp.W_out"] + w.get("mlp.b_out", 0.0))
            x = at(f"{block}.hook_resid_post", (x + attn_out if self.parallel else mid) + mlp_out)
        x = self.norm(receives(None, "unembed", x), "ln_final", self.ends)
        return x @ self.ends["unembed.W_U"] + self.ends.get("unembed.b_U", 0.0)


def plain_of_hooked(model):
    """A HookedTransformer's network."""
    cfg = model.cfg
    weights = {name.replace("._", "."): value.detach().clone() for name, value in model.named_parameters()}
    layers = [
        {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"blocks.{layer}.")}
        for layer in range(cfg.n_layers)
    ]
    ends = {name: value for name, value in weights.items() if not name.startswith("blocks.")}
    return Plain(
        layers,
        ends,
        cfg.n_heads,
        cfg.act_fn,
        cfg.eps,
        cfg.normalization_type,
        cfg.parallel_attn_mlp,
        cfg.rotary_dim if cfg.positional_embedding_type == "rotary" else 0,
        angles=cfg.dtype,
    )


PLAIN = ("gpt2", "gpt_neox", "llama")


def plain_of_hugging_face(model):
    """A Hugging Face GPT-2's, GPT-NeoX's or Llama's network."""
    config, kind = model.config, model.config.model_type
    n_heads, d_model = config.num_attention_heads, config.hidden_size
    d_head = d_model // n_heads
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    blocks = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "llama": "model.layers"}[kind]
    layers = []
    for layer in range(config.num_hidden_layers):
        prefix, out = f"{blocks}.{layer}.", {}
        w = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        if kind == "gpt2":
            for i, via in enumerate("QKV"):
                part = slice(i * d_model, (i + 1) * d_model)
                weight = w["attn.c_attn.weight"][:, part].reshape(d_model, n_heads, d_head)
                out[f"attn.W_{via}"] = weight.transpose(0, 1)
                out[f"attn.b_{via}"] = w["attn.c_attn.bias"][part].reshape(n_heads, d_head)
            out["attn.W_O"] = w["attn.c_proj.weight"].reshape(n_heads, d_head, d_model)
            out["mlp.W_in"], out["mlp.W_out"] = w["mlp.c_fc.weight"], w["mlp.c_proj.weight"]
            names = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")
        elif kind == "gpt_neox":
            weight = w["attention.query_key_value.weight"].reshape(n_heads, 3, d_head, d_model)
            bias = w["attention.query_key_value.bias"].reshape(n_heads, 3, d_head)
            for i, via in enumerate("QKV"):
                out[f"attn.W_{via}"], out[f"attn.b_{via}"] = weight[:, i].transpose(1, 2), bias[:, i]
            out["attn.W_O"] = w["attention.dense.weight"].T.reshape(n_heads, d_head, d_model)
            out["mlp.W_in"], out["mlp.W_out"] = w["mlp.dense_h_to_4h.weight"].T, w["mlp.dense_4h_to_h.weight"].T
            mlp = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
            names = ("attention.dense", *mlp, "input_layernorm", "post_attention_layernorm")
        else:
            for via in "QKV":
                weight = w[f"self_attn.{via.lower()}_proj.weight"]
                out[f"attn.W_{via}"] = weight.reshape(-1, d_head, d_model).transpose(1, 2)
            out["attn.W_O"] = w["self_attn.o_proj.weight"].T.reshape(n_heads, d_head, d_model)
            for name, theirs in (("gate", "gate"), ("in", "up"), ("out", "down")):
                out[f"mlp.W_{name}"] = w[f"mlp.{theirs}_proj.weight"].T
            names = ("-", "-", "-", "input_layernorm", "post_attention_layernorm")
        out["ln1.w"], out["ln2.w"] = (w[f"{norm}.weight"] for norm in names[3:])
        biases = zip(("attn.b_O", "mlp.b_in", "mlp.b_out", "ln1.b", "ln2.b"), names, strict=True)
        out |= {ours: w[f"{theirs}.bias"] for ours, theirs in biases if f"{theirs}.bias" in w}
        layers.append(out)
    embed, norm = {
        "gpt2": ("transformer.wte", "transformer.ln_f"),
        "gpt_neox": ("gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
        "llama": ("model.embed_tokens", "model.norm"),
    }[kind]
    unembed = next(weights[name] for name in ("lm_head.weight", "embed_out.weight") if name in weights)
    ends = {"embed.W_E": weights[f"{embed}.weight"], "unembed.W_U": unembed.T, "ln_final.w": weights[f"{norm}.weight"]}
    others = (("pos_embed.W_pos", "transformer.wpe.weight"), ("ln_final.b", f"{norm}.bias"))
    ends |= {ours: weights[theirs] for ours, theirs in others if theirs in weights}
    own = {
        "gpt2": lambda: {"act": "gelu_new", "eps": config.layer_norm_epsilon},
        "gpt_neox": lambda: {"act": "gelu", "eps": config.layer_norm_eps, "parallel": True, "rotary_dim": d_head // 2},
        "llama": lambda: {
            "act": "silu",
            "eps": config.rms_norm_eps,
            "norm_type": "RMS",
            "rotary_dim": d_head,
            "rounds": True,
        },
    }[kind]()
    return Plain(layers, ends, n_heads, **own)

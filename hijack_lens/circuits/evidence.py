"""The evidence for each component of a circuit that was found, and why others were not named."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import check_choice, check_fields
from hijack_lens.core.circuit import ROLE_NAMES, Circuit, Component
from hijack_lens.core.tables import Drawn

MIN_ATTENTION = 0.1
"""Heads with a lower score are not named, even if it is clearly above chance: in random models that are tiny or have
very large weights, some head reaches 0.05. For previous-token heads, above what attending to all alike would give."""

N_SCREENED = 8
"""Prompts on which heads are switched off; on the others, only those candidates that these leave open."""

MIN_GAIN = 0.05
"""Nats: a model with a lower in-context gain has no induction circuit."""

MIN_EFFECT = 0.02
"""Heads that carry a smaller part of the in-context gain are not named."""

MIN_INFORMATION = 0.1
"""Nats: a model whose context-free predictions tell less about the current token has no bigram memory."""

MIN_SHARE = 0.1
"""MLPs that carry a smaller part of the context-free prediction are not named."""

SCRAMBLES_ABOVE = 1 / 500
"""An MLP is not named if its output in random directions has a larger effect in more cases."""


def needed_excess() -> float:
    """The standard deviations by which a normal variable exceeds its mean in just so many cases."""
    return NormalDist().inv_cdf(1 - SCRAMBLES_ABOVE)


@dataclass(frozen=True)
class HeadEvidence:
    """Every head's scores for one role. NaN: not measured, since the head's attention had ruled it out.

    Attributes:
        score: attention to where the role looks, from where it is played. For previous-token heads, the previous
            position, from those that induction attends to; for induction heads, the token after the current one's
            previous occurrence, minus what the same positions get if the earlier tokens are in another order.
        null: what the score must exceed.
        lost: nats of in-context gain lost when only this head is switched off.
        regained: nats regained when all the role's candidates are switched off and then this head is switched on
            again; heads that back one another up show here.
        error: half the 95% interval of the larger of these two (Student's, over prompts).
        effect_null: what one of these two must exceed.
        lost_together: nats lost when all the role's candidates are switched off.
    """

    score: Float[Tensor, "layer head"]
    null: Float[Tensor, "layer head"]
    lost: Float[Tensor, "layer head"]
    regained: Float[Tensor, "layer head"]
    error: Float[Tensor, "layer head"]
    effect_null: float
    lost_together: float

    @property
    def candidates(self) -> list[Component]:
        """Heads whose effect was measured."""
        return [Component(layer, "head", head) for layer, head in (~self.lost.isnan()).nonzero().tolist()]

    @property
    def undecided(self) -> list[Component]:
        """Candidates whose effect is not clearly above or below what it must exceed: other prompts may differ."""
        near = (torch.maximum(self.lost, self.regained) - self.effect_null).abs() < self.error
        return [head for head in self.candidates if near[head.layer, head.head]]

    @property
    def best(self) -> Component:
        """The head with the largest score."""
        layer, head = divmod(int(self.score.argmax()), self.score.shape[1])
        return Component(layer, "head", head)


@dataclass(frozen=True)
class MLPEvidence:
    """Every MLP's part in the context-free prediction P(v): what follows token v, averaged over random contexts.

    Attributes:
        information: nats that P tells about v, the mean of KL(P(v) || mean over v of P). With other predictions Q in
            place of P inside the logarithms, this is what Q tells about v: never more.
        share: the part of the information that is lost once the MLP's output no longer depends on the token. Clipped
            to [0, 1] (if more is lost, Q is worse than no prediction). NaN: there is no MLP. Shares need not add up
            to 1: MLPs in series each carry what passes through all of them.
        error: half the 95% interval of the share (Student's, over the tokens drawn).
        direct_share: the part that is left when no head's or MLP's output depends on the token: what goes directly
            from the embedding to the unembedding; from 0 to 1.
        effect: root mean square, in logits, of how the MLP's output changes the log-probabilities, without changes that
            all v or all predicted tokens share. NaN: not measured, since the share had ruled the MLP out.
        null: what the effect must exceed: the largest effect of the same output over 499 random draws that shuffle the
            residual stream's coordinates and flip their signs. Drawing stops at the first that is as large; after 20,
            once the effect lies above what they let expect of others in all but 1 of 5000 cases, if logarithms of
            effects are normal; and, in large models, after 64 if it may lie on either side of 1 of 500 cases, which is
            then the null.
        draws: how many were drawn.
        excess: how many standard deviations the effect's logarithm lies above the mean of the draws'; a normal variable
            exceeds 2.88 in 1 of 500 cases. NaN: the draws decide (none is as large, or one of the first three), or some
            are zero.
        excess_error: half its 95% interval, over draws and over tokens.
    """

    information: float
    share: Float[Tensor, "layer"]
    error: Float[Tensor, "layer"]
    direct_share: float
    effect: Float[Tensor, "layer"]
    null: Float[Tensor, "layer"]
    draws: Int[Tensor, "layer"]
    excess: Float[Tensor, "layer"]
    excess_error: Float[Tensor, "layer"]

    @property
    def undecided(self) -> list[Component]:
        """MLPs whose share or effect is not clearly above or below what it must exceed: other tokens, and other draws
        of random directions, may differ."""
        near_share = ((self.share - MIN_SHARE).abs() < self.error) & ~(self.effect <= self.null)
        near = near_share | ((self.excess - needed_excess()).abs() < self.excess_error)
        return [Component(layer, "mlp") for layer in near.nonzero()[:, 0].tolist()]


@dataclass(frozen=True, repr=False)
class CircuitEvidence(Drawn):
    """What `find_circuit` measured and concluded; displayed as a table.

    Attributes:
        circuit: the components named (without evidence).
        previous_token: every head's evidence.
        induction: every head's evidence.
        bigram: every MLP's evidence.
        gain: the in-context gain, in nats: how much more log-probability the right next token gets on repeated random
            tokens than after the same tokens in another order.
        gain_null: what the gain must exceed.
        others: nats of in-context gain lost when only this head is switched off, of heads that attend as neither role
            does. NaN: not measured, since it does, or since its layer's such heads together lose too little, or since
            there is no gain.
        others_error: half the 95% intervals of these (Student's, over prompts).
        others_null: what that must exceed.
        n_prompts: prompts scored; as many others were used for ablation where the first 8 of them left it open.
        period: tokens that each prompt repeats.

    Examples:
        >>> evidence = hl.find_circuit(model).evidence
        >>> print(evidence.verdicts)
        previous-token head: L0H0 (attention 1.00; 93% of the in-context gain lost without it)
        induction head: L1H0 (attention 0.89; 99% of the in-context gain lost without it)
        bigram memory: L1MLP (100% ± 6% of the context-free prediction)
        >>> evidence.by_effect
        ()
    """

    circuit: Circuit
    previous_token: HeadEvidence
    induction: HeadEvidence
    bigram: MLPEvidence
    gain: float
    gain_null: float
    others: Float[Tensor, "layer head"]
    others_error: Float[Tensor, "layer head"]
    others_null: float
    n_prompts: int
    period: int

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def by_effect(self) -> tuple[Component, ...]:
        """Heads that carry the in-context gain, by effect alone: they attend as neither role does."""
        # Effects that were not measured are NaN, which exceeds nothing.
        return tuple(
            Component(layer, "head", head) for layer, head in (self.others > self.others_null).nonzero().tolist()
        )

    def verdict(self, role: str) -> str:
        """One sentence: what was found for a role, or why nothing was.

        Raises:
            ValueError: for a role that circuits do not have.
        """
        check_choice("role", role, ROLE_NAMES)
        named = getattr(self.circuit, role)
        if named:
            said = f"{ROLE_NAMES[role]}: {', '.join(f'{part} ({self._why(role, part)})' for part in named)}"
        else:
            said = f"no {ROLE_NAMES[role]}: {self._why_no_mlp() if role == 'bigram' else self._why_no_head(role)}"
        undecided = getattr(self, role).undecided
        if named and role != "bigram":
            left = [part for part in getattr(self, role).candidates if part not in (*named, *undecided)]
            said += f"; not {', '.join(f'{part} ({self._why(role, part)})' for part in left)}" if left else ""
        unsure = [self._interval(role, part) for part in undecided]
        return f"{said}; undecided: {', '.join(unsure)}" if unsure else said

    @property
    def verdicts(self) -> str:
        """The verdicts on all roles, one per line; and on the heads that only their effect gives away, if any."""
        lines = list(map(self.verdict, ROLE_NAMES))
        if self.by_effect:
            named = ", ".join(
                f"{part} ({self._lost(part)} of the in-context gain lost without it)" for part in self.by_effect
            )
            lines.append(f"by effect alone, with attention of neither role: {named}")
        near = ((self.others - self.others_null).abs() < self.others_error).nonzero().tolist()
        if near:
            parts = [Component(layer, "head", head) for layer, head in near]
            unsure = ", ".join(f"{part} ({self._lost(part)})" for part in parts)
            needed = f"{self.others_null / self.gain:.0%}"
            lines.append(f"undecided by effect alone, where {needed} of the in-context gain must be lost: {unsure}")
        return "\n".join(lines)

    def _lost(self, part: Component) -> str:
        lost, error = (float(values[part.layer, part.head]) / self.gain for values in (self.others, self.others_error))
        return f"{lost:.0%} ± {error:.0%}"

    def to_pandas(self) -> pd.DataFrame:
        """One row per role and component that might have it.

        Columns: role, component, layer, head (missing for MLPs), score (attention or share), null (what it must
        exceed), effect (nats lost, or the MLP's effect in logits), regained (nats), effect_null, named.
        """
        rows: list[dict[str, Any]] = []
        for role in ("previous_token", "induction"):
            heads = getattr(self, role)
            for layer, head in torch.cartesian_prod(*map(torch.arange, heads.score.shape)).tolist():
                part = Component(layer, "head", head)
                score, null, lost, regained = (
                    float(getattr(heads, name)[layer, head]) for name in ("score", "null", "lost", "regained")
                )
                rows.append(self._row(role, part, score, null, lost, regained, heads.effect_null))
        for layer, share in enumerate(self.bigram.share.tolist()):
            effect, null = float(self.bigram.effect[layer]), float(self.bigram.null[layer])
            rows.append(self._row("bigram", Component(layer, "mlp"), share, MIN_SHARE, effect, torch.nan, null))
        return pd.DataFrame(rows).astype({"head": "Int64"})

    def _row(
        self, role: str, part: Component, score: float, null: float, effect: float, regained: float, effect_null: float
    ) -> dict[str, Any]:
        return {
            "role": role,
            "component": str(part),
            "layer": part.layer,
            "head": part.head,
            "score": score,
            "null": null,
            "effect": effect,
            "regained": regained,
            "effect_null": effect_null,
            "named": part in getattr(self.circuit, role),
        }

    def _why(self, role: str, part: Component) -> str:
        if role == "bigram":
            return f"{self._share(part)} of the context-free prediction"
        heads, at = getattr(self, role), (part.layer, part.head)
        lost, regained = (float(values[at]) / self.gain for values in (heads.lost, heads.regained))
        back = f", {regained:.0%} back with it alone" if len(heads.candidates) > 1 else ""
        return f"attention {float(heads.score[at]):.2f}; {lost:.0%} of the in-context gain lost without it{back}"

    def _share(self, mlp: Component) -> str:
        share, error = (float(values[mlp.layer]) for values in (self.bigram.share, self.bigram.error))
        return f"{share:.0%} ± {error:.0%}" if error >= 0.005 else f"{share:.0%}"

    def _interval(self, role: str, part: Component) -> str:
        if role == "bigram":
            excess, reach = (float(values[part.layer]) for values in (self.bigram.excess, self.bigram.excess_error))
            if abs(excess - needed_excess()) < reach:
                return (
                    f"{part} (moves logits {excess:.1f} ± {reach:.1f} standard deviations more than in random "
                    f"directions; {needed_excess():.1f} needed)"
                )
            return f"{part} ({self._share(part)}; {MIN_SHARE:.0%} needed)"
        heads, at = getattr(self, role), (part.layer, part.head)
        effect, error = max(float(heads.lost[at]), float(heads.regained[at])), float(heads.error[at])
        return f"{part} ({effect:.2f} ± {error:.2f} nats; null {heads.effect_null:.2f})"

    def _why_no_head(self, role: str) -> str:
        heads = getattr(self, role)
        score, null = float(heads.score.max()), float(heads.null[heads.best.layer, heads.best.head])
        if not bool((heads.score > heads.null).any()):
            return f"the best score {score:.2f} ({heads.best}) is below the null's {null:.2f}"
        if self.gain <= self.gain_null:
            return (
                f"the order of the tokens before changes the right token's log-probability by {self.gain:+.2f} nats, "
                f"not above the null's {self.gain_null:.2f}"
            )
        if not heads.candidates:
            return "no head that looks there comes before an induction head"
        largest = float(torch.maximum(heads.lost, heads.regained).nan_to_num(-torch.inf).max())
        return (
            f"{', '.join(map(str, heads.candidates))} look there, but carry at most {largest:.2f} nats of the "
            f"in-context gain of {self.gain:.2f}, not above the null's {heads.effect_null:.2f}"
        )

    def _why_no_mlp(self) -> str:
        share, effect, null = self.bigram.share, self.bigram.effect, self.bigram.null
        if bool(share.isnan().all()):
            return "the model has no MLP"
        if self.bigram.information < MIN_INFORMATION:
            return (
                f"without context, predictions tell {self.bigram.information:.2f} nats about the current token, below "
                f"{MIN_INFORMATION:.2f}"
            )
        best = int(share.nan_to_num(-1).argmax())
        if bool(effect.isnan().all()):
            return f"the best share {float(share[best]):.0%} ({Component(best, 'mlp')}) is below {MIN_SHARE:.0%}"
        best = int((effect - null).nan_to_num(-torch.inf).argmax())
        return (
            f"{Component(best, 'mlp')} moves logits by {float(effect[best]):.2f}, but up to {float(null[best]):.2f} "
            "where it writes in random directions"
        )

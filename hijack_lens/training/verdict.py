"""Whether training made both memories, and the likeliest reason if it did not."""

from contextlib import nullcontext
from dataclasses import replace

from hijack_lens.hooks.ablate_and_patch import ablate
from hijack_lens.language import BigramLanguage, best_accuracy, shortcut_accuracy
from hijack_lens.models.formed import Formed
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.training.config import UNTIL_FORMED, TrainConfig
from hijack_lens.training.data import in_context, judged_on, moved
from hijack_lens.training.forward import PlainForward
from hijack_lens.training.run import TrainingRun

FEW = 0.1
"""Share of tokens that follow from the context: with less, the circuit seldom forms without a boost."""

FELL = 0.1
"""By how much induction attention falls while the bigrams improve, where the learning rate is too high."""


class Judge:
    """What a training's model is judged by: natural sequences that it has not seen."""

    def __init__(self, model: BigramTransformer, language: BigramLanguage, config: TrainConfig):
        self.model, self.language, self.config = model, language, config
        self.sequences, self.sampled = judged_on(language, config)
        # Trained only where tokens follow from the context, a model need not ask whether they do.
        random = config.random_triggers and config.loss == "all"
        self.best = best_accuracy(language, self.sequences, random_triggers=random, continuations=config.continuations)
        self.shortcut = shortcut_accuracy(language, self.sequences)
        self.enough = config.formed_at * self.best  # for forming to end
        self._there = moved(self.sequences, model.W_E.device)

    def formed(self, run: TrainingRun) -> Formed:
        """What the memories have reached; the run's table holds the probes so far."""
        accuracy, loss = in_context(PlainForward(self.model), self._there)
        heads = self.model.circuit.previous_token
        with ablate(self.model, heads) if heads else nullcontext():
            _, without_order = in_context(self.model, self._there)
        found = Formed(
            accuracy,
            self.best,
            self.shortcut,
            without_order - loss,
            float(run.probe("bigram_excess").iloc[-1]),
            random_triggers=self.config.random_triggers,
            predictable_only=self.config.loss == "predictable",
        )
        if found:
            return found
        cause, remedy = self._missing_context(run) if not found.context else self._missing_weights()
        return replace(found, cause=cause, remedy=remedy)

    def _missing_context(self, run: TrainingRun) -> tuple[str, str]:
        """Why no circuit formed, and what to change."""
        config, heads = self.config, self.model.circuit
        until = config.steps == UNTIL_FORMED
        per_sequence = int(self.sequences.predictable[:, :-1].sum()) / self.sampled
        attention, excess = run.probe("induction_attention"), run.probe("bigram_excess")
        if not heads.previous_token or not heads.induction:
            return "the model has no head before another one, as induction takes", "n_layers=2"
        if self.model.positions == "none":
            return "without positions no head can tell which token came before", "positions='relative'"
        if not per_sequence:
            return (
                f"no trigger comes a second time within {config.length} tokens",
                "triggers='frequent' with n_triggers=5, or longer sequences",
            )
        if config.random_triggers and config.loss == "all":
            share, needed = self._worth_copying()
            if share < needed:
                return (
                    f"of the tokens that come again, {share:.0%} are triggers, and copying seldom pays below "
                    f"{needed:.0%} or so, since logits that add cannot copy only what is surprising",
                    "more triggers (n_triggers=), or the same ones in all sequences (triggers='frequent')",
                )
        if attention.max() - attention.iloc[-1] > FELL and excess.iloc[-1] < excess[attention.idxmax()]:
            name = "forming_lr" if until else "lr"
            return (
                f"the learning rate is too high: induction attention fell from {attention.max():.2f} to "
                f"{attention.iloc[-1]:.2f} while the bigrams improved",
                f"{name}={getattr(config, name) / 3:.1g}",
            )
        if per_sequence < FEW * config.length and not (until and config.boost):
            return (
                f"only {per_sequence:.1f} of {config.length} tokens follow from the context",
                "steps='until formed', whose boost makes them more; or more triggers",
            )
        name = "max_steps" if until else "steps"
        return f"too few steps, {getattr(config, name)}", f"{name}={3 * getattr(config, name)}" + (
            "" if until else ", or steps='until formed'"
        )

    def _missing_weights(self) -> tuple[str, str]:
        config, d_vocab = self.config, self.language.d_vocab
        name, taken = (
            ("steps", config.steps) if isinstance(config.steps, int) else ("finish_steps", config.finishing(d_vocab))
        )
        return f"too few steps to learn the bigrams of {self.language.d_vocab} tokens, {taken}", f"{name}={3 * taken}"

    def _worth_copying(self) -> tuple[float, float]:
        """Of the tokens that have come up before, the share that are triggers; and from what share copying pays.

        A logit added to what followed before makes it the likeliest next token where that is a trigger's continuation
        with probability p > (1 - p) * max pi_b: elsewhere the chain goes on, most likely to its favourite.
        """
        language, tokens = self.language, self.sequences.tokens
        again = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(-1)
        trigger = (tokens[:, :, None] == self.sequences.triggers[:, None, :]).any(-1)
        favourite = float((language.long_run * language.pi_b.max(-1).values).sum())
        return float(trigger[again].double().mean()), favourite / (1 + favourite)

"""Train a built-in model on the `pydocs` corpus, from nothing to a Hugging Face folder.

Run:  python experiments/builtin_models/train.py --model qwen3_moe_tiny
Out:  outputs/training/<model>/: state.safetensors (for resuming), final/ (bfloat16 model, tokenizer, card with the log).

Seeded and resumable: data order and dropout depend on (seed, step) alone, so a run that was stopped and started again
gives the weights of an uninterrupted one. `--install` copies final/ into the package.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from heapr.calibration.corpora import DOCUMENT_SEPARATOR, PyDocs

VOCABULARY_SIZE = 2048  # 1.6 MB of text teach no larger one well, and the experts stay most of the model
END_OF_TEXT = "<|endoftext|>"
MODELS_FOLDER = Path(__file__).resolve().parents[2] / "heapr" / "model" / "builtin"


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the training run."""

    model: str
    num_steps: int
    batch_size: int = 16
    sequence_length: int = 256
    learning_rate: float = 2e-3
    final_learning_rate_ratio: float = 0.02
    num_warmup_steps: int = 100
    weight_decay: float = 0.1
    average_decay: float = 0.99  # exponential moving average of the weights: the model that is shipped
    seed: int = 0


def build_config(name: str) -> PretrainedConfig:
    """Architecture of a built-in model."""
    if name != "qwen3_moe_tiny":
        raise SystemExit(f"no built-in model '{name}'; known: qwen3_moe_tiny")
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        intermediate_size=256,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        attention_dropout=0.1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the train documents; no token is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=512)


def sample_batch(document_ids: list[Tensor], recipe: Recipe, step: int) -> Tensor:
    """(batch_size, sequence_length) token ids: windows of freshly shuffled documents, a function of (seed, step) alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    needed = recipe.batch_size * recipe.sequence_length
    chosen, length = [], 0
    for index in torch.randperm(len(document_ids), generator=generator).tolist():
        chosen.append(document_ids[index])
        length += len(document_ids[index])
        if length > needed:
            break
    tokens = torch.cat(chosen)
    offset = int(torch.randint(len(tokens) - needed + 1, (1,), generator=generator))
    return tokens[offset : offset + needed].view(recipe.batch_size, recipe.sequence_length)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine to final_learning_rate_ratio of the peak."""
    if step < recipe.num_warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.num_warmup_steps
    progress = (step - recipe.num_warmup_steps) / max(1, recipe.num_steps - recipe.num_warmup_steps)
    floor = recipe.final_learning_rate_ratio
    return recipe.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, tokens: Tensor, recipe: Recipe) -> float:
    """Mean next-token cross-entropy in nats over non-overlapping windows, first token of each not predicted."""
    model.eval()
    num_windows = len(tokens) // recipe.sequence_length
    windows = tokens[: num_windows * recipe.sequence_length].view(num_windows, recipe.sequence_length)
    total = 0.0
    for batch in windows.split(32):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / (num_windows * (recipe.sequence_length - 1))


class TrainingState:
    """Model, its moving average, Adam's moments and the log; saved as one safetensors file."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.step = recipe, 0
        self.log: list[dict[str, float]] = []
        self.model = Qwen3MoeForCausalLM(build_config(recipe.model))
        self.model.set_experts_implementation("grouped_mm")
        self.average = copy.deepcopy(self.model)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        plain = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(self.recipe.average_decay, (1 + self.step) / (10 + self.step))
        for mean, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(new, 1 - decay)

    def save(self, folder: Path) -> None:
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors |= {f"average.{name}": p.detach() for name, p in self.average.named_parameters()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors |= {f"exp_avg.{name}": moments["exp_avg"], f"exp_avg_sq.{name}": moments["exp_avg_sq"]}
        metadata = {"step": str(self.step), "made_by": self._made_by(), "log": json.dumps(self.log)}
        temporary = folder / "state.safetensors.part"
        save_file(tensors, temporary, metadata=metadata)
        temporary.rename(folder / "state.safetensors")

    def load(self, folder: Path) -> None:
        """Go on from what was saved, if anything was.

        Raises:
            SystemExit: it was made by another recipe, architecture or corpus.
        """
        path = folder / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if metadata["made_by"] != self._made_by():
            raise SystemExit(f"{path} was made with another recipe, architecture or corpus; remove it or choose another --output")
        self.step, self.log = int(metadata["step"]), json.loads(metadata["log"])
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.average.named_parameters():
                parameter.copy_(tensors[f"average.{name}"])
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }

    def _made_by(self) -> str:
        """Everything that determines the weights."""
        corpus = PyDocs("train").identity()
        return json.dumps([asdict(self.recipe), self.model.config.to_diff_dict(), corpus], sort_keys=True, default=str)


def train_step(state: TrainingState, batch: Tensor, recipe: Recipe) -> float:
    """One AdamW step; returns the loss, router auxiliary loss included."""
    torch.manual_seed(recipe.seed * 7_368_787 + state.step)  # dropout
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, state.step)
    loss = state.model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    state.update_average()
    return loss.item()


def train(state: TrainingState, document_ids: list[Tensor], heldout_tokens: Tensor, *, folder: Path, evaluate_every: int) -> None:
    """Train to the last step; the log is part of the saved state, so that a stop between the two loses nothing."""
    recipe, started = state.recipe, time.time() - (state.log[-1]["seconds"] if state.log else 0.0)
    while state.step < recipe.num_steps:
        loss = train_step(state, sample_batch(document_ids, recipe, state.step), recipe)
        if state.step % evaluate_every == 0 or state.step == recipe.num_steps:
            heldout = math.exp(heldout_loss(state.average, heldout_tokens, recipe))
            row = {"step": state.step, "train_loss": loss, "heldout_perplexity": heldout, "seconds": time.time() - started}
            state.log.append(row)
            state.save(folder)
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3_moe_tiny")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    arguments = parser.parse_args()
    recipe = Recipe(model=arguments.model, num_steps=arguments.steps)
    folder = arguments.output or Path("outputs/training") / recipe.model
    folder.mkdir(parents=True, exist_ok=True)

    train_documents, heldout_documents = PyDocs("train").documents(), PyDocs("heldout").documents()
    tokenizer = train_tokenizer(train_documents)
    encode = lambda texts: [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]  # noqa: E731 (one use, one line)
    document_ids = encode([text + DOCUMENT_SEPARATOR for text in train_documents])
    heldout_tokens = encode([DOCUMENT_SEPARATOR.join(heldout_documents)])[0]
    print(f"{sum(map(len, document_ids))} train tokens, {len(heldout_tokens)} held-out tokens", flush=True)

    state = TrainingState(recipe)
    state.load(folder)
    train(state, document_ids, heldout_tokens, folder=folder, evaluate_every=arguments.evaluate_every)

    final = folder / "final"
    model = state.average.to(torch.bfloat16)
    model.set_experts_implementation("eager")
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    loss = heldout_loss(model.float(), heldout_tokens, recipe)
    num_bytes = len(DOCUMENT_SEPARATOR.join(heldout_documents).encode())
    bits_per_byte = loss / math.log(2) * len(heldout_tokens) / num_bytes
    write_card(final, recipe, perplexity=math.exp(loss), bits_per_byte=bits_per_byte, log=state.log)
    if arguments.install:
        shutil.copytree(final, MODELS_FOLDER / recipe.model, dirs_exist_ok=True)


def write_card(folder: Path, recipe: Recipe, *, perplexity: float, bits_per_byte: float, log: list[dict[str, float]]) -> None:
    """README.md of the model folder: what it is, how it was made, what it reached."""
    rows = "\n".join(f"| {r['step']} | {r['train_loss']:.3f} | {r['heldout_perplexity']:.2f} | {r['seconds']:.0f} |" for r in log)
    (folder / "README.md").write_text(
        f"""# {recipe.model}
A small Mixture-of-Experts language model for trying out pruning without a network: 4 layers x 16 experts x 64 atomic
experts, top-4, 2.0 million parameters, bfloat16. It is a test object, not a useful language model.

Trained on the docstrings of Python {platform.python_version()}'s standard library (corpus `pydocs`, split `train`) by

    python experiments/builtin_models/train.py --model {recipe.model} --steps {recipe.num_steps}

with `{json.dumps(asdict(recipe))}`.

Perplexity on the held-out documents (windows of {recipe.sequence_length} tokens, bfloat16 weights, computed in float32):
**{perplexity:.2f}** with its vocabulary of {VOCABULARY_SIZE} tokens; {bits_per_byte:.3f} bits per byte.

| step | train loss (with router auxiliary loss) | held-out perplexity | seconds |
|---|---|---|---|
{rows}
"""
    )


if __name__ == "__main__":
    main()

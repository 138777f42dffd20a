"""Train a built-in model on the `pydocs` corpus, from nothing to a Hugging Face folder.

Run:  python experiments/builtin_models/train.py --model qwen3_moe_tiny
Out:  outputs/training/<model>/: state.safetensors (for resuming), final/ (bfloat16 model, tokenizer, card
with the log).

Seeded and resumable: data order and dropout depend on (seed, step) alone, so a run that was stopped and
started again gives the weights of an uninterrupted one. `--install` copies final/ into the package.
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
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from heapr.model.deepseek_moe import DeepseekForCausalLM, DeepseekMoeConfig
from heapr.model.moe import find_moe_layers
from heapr.text.corpora import PyDocs
from heapr.text.tokenizing import DOCUMENT_SEPARATOR

VOCABULARY_SIZE = 2048  # 1.6 MB of text teach no larger one well, and the experts stay most of the model
END_OF_TEXT = "<|endoftext|>"
MODELS_FOLDER = Path(__file__).resolve().parents[2] / "heapr" / "model" / "builtin"
ROUTER_AUXILIARY_LOSS = 0.01  # coefficient of the load-balancing loss, which keeps every expert in use

COMMON_FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 4,
    "attention_dropout": 0.1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# name: model class, config class, and the config's fields beside the common ones
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], type[PretrainedConfig], dict[str, Any]]] = {
    "qwen3_moe_tiny": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "num_hidden_layers": 4,
            "num_experts": 16,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "router_aux_loss_coef": ROUTER_AUXILIARY_LOSS,
        },
    ),
    "deepseek_moe_tiny": (
        DeepseekForCausalLM,
        DeepseekMoeConfig,
        {
            "num_hidden_layers": 5,
            "first_k_dense_replace": 1,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": False,
            "aux_loss_alpha": ROUTER_AUXILIARY_LOSS,
            "seq_aux": False,
        },
    ),
}


@dataclass(frozen=True)
class Schedule:
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


def build_model(name: str) -> PreTrainedModel:
    """A built-in model with fresh weights, drawn from torch's global generator."""
    if name not in ARCHITECTURES:
        raise SystemExit(f"no built-in model '{name}'; known: {', '.join(ARCHITECTURES)}")
    model_class, config_class, fields = ARCHITECTURES[name]
    model: PreTrainedModel = model_class(config_class(**COMMON_FIELDS, **fields))
    return model


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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=512
    )


def sample_batch(document_ids: list[Tensor], schedule: Schedule, step: int) -> Tensor:
    """(batch_size, sequence_length) token ids: windows of freshly shuffled documents, a function of (seed,
    step) alone."""
    generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
    needed = schedule.batch_size * schedule.sequence_length
    chosen, length = [], 0
    for index in torch.randperm(len(document_ids), generator=generator).tolist():
        chosen.append(document_ids[index])
        length += len(document_ids[index])
        if length > needed:
            break
    tokens = torch.cat(chosen)
    offset = int(torch.randint(len(tokens) - needed + 1, (1,), generator=generator))
    return tokens[offset : offset + needed].view(schedule.batch_size, schedule.sequence_length)


def learning_rate(schedule: Schedule, step: int) -> float:
    """Linear warm-up, then cosine to final_learning_rate_ratio of the peak."""
    if step < schedule.num_warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.num_warmup_steps
    progress = (step - schedule.num_warmup_steps) / max(1, schedule.num_steps - schedule.num_warmup_steps)
    floor = schedule.final_learning_rate_ratio
    return schedule.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, tokens: Tensor, schedule: Schedule) -> float:
    """Mean next-token cross-entropy in nats over non-overlapping windows, first token of each not
    predicted."""
    model.eval()
    num_windows = len(tokens) // schedule.sequence_length
    windows = tokens[: num_windows * schedule.sequence_length].view(num_windows, schedule.sequence_length)
    total = 0.0
    for batch in windows.split(32):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return total / (num_windows * (schedule.sequence_length - 1))


class TrainingState:
    """Model, its moving average, Adam's moments and the log; saved as one safetensors file."""

    def __init__(self, schedule: Schedule) -> None:
        torch.manual_seed(schedule.seed)
        self.schedule, self.step = schedule, 0
        self.log: list[dict[str, float]] = []
        self.model = build_model(schedule.model)
        self.model.set_experts_implementation("grouped_mm")
        self.average = copy.deepcopy(self.model)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        plain = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": schedule.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95))

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(self.schedule.average_decay, (1 + self.step) / (10 + self.step))
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
            SystemExit: it was made by another schedule, architecture or corpus.
        """
        path = folder / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if metadata["made_by"] != self._made_by():
            raise SystemExit(
                f"{path} was made with another schedule, architecture or corpus; remove it or choose another"
                " --output"
            )
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
        return json.dumps(
            [asdict(self.schedule), self.model.config.to_diff_dict(), corpus], sort_keys=True, default=str
        )


def train_step(state: TrainingState, batch: Tensor, schedule: Schedule) -> float:
    """One AdamW step; returns the loss, router auxiliary loss included."""
    torch.manual_seed(schedule.seed * 7_368_787 + state.step)  # dropout
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(schedule, state.step)
    outputs = state.model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
    loss = outputs.loss
    if outputs.aux_loss is None:  # this family's loss leaves the load balancing to the training
        config = state.model.config
        # layer by layer, as DeepSeekMoE (eq. 12): over all layers at once a dead expert of one is outweighed
        # by the others
        for logits in outputs.router_logits:
            auxiliary = load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
            loss = loss + ROUTER_AUXILIARY_LOSS * auxiliary
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    state.update_average()
    return loss.item()


def train(
    state: TrainingState,
    document_ids: list[Tensor],
    heldout_tokens: Tensor,
    *,
    folder: Path,
    evaluate_every: int,
) -> None:
    """Train to the last step; the log is part of the saved state, so that a stop between the two loses
    nothing."""
    schedule, started = state.schedule, time.time() - (state.log[-1]["seconds"] if state.log else 0.0)
    while state.step < schedule.num_steps:
        loss = train_step(state, sample_batch(document_ids, schedule, state.step), schedule)
        if state.step % evaluate_every == 0 or state.step == schedule.num_steps:
            heldout = math.exp(heldout_loss(state.average, heldout_tokens, schedule))
            row = {
                "step": state.step,
                "train_loss": loss,
                "heldout_perplexity": heldout,
                "seconds": time.time() - started,
            }
            state.log.append(row)
            state.save(folder)
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3_moe_tiny")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    arguments = parser.parse_args()
    schedule = Schedule(model=arguments.model, num_steps=arguments.steps)
    folder = arguments.output or Path("outputs/training") / schedule.model
    folder.mkdir(parents=True, exist_ok=True)

    train_documents, heldout_documents = PyDocs("train").documents(), PyDocs("heldout").documents()
    tokenizer = train_tokenizer(train_documents)
    encode = lambda texts: [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]  # noqa: E731 (one use, one line)
    document_ids = encode([text + DOCUMENT_SEPARATOR for text in train_documents])
    heldout_tokens = encode([DOCUMENT_SEPARATOR.join(heldout_documents)])[0]
    print(f"{sum(map(len, document_ids))} train tokens, {len(heldout_tokens)} held-out tokens", flush=True)

    state = TrainingState(schedule)
    state.load(folder)
    train(state, document_ids, heldout_tokens, folder=folder, evaluate_every=arguments.evaluate_every)

    final = folder / "final"
    model = state.average.to(torch.bfloat16)
    model.set_experts_implementation("eager")
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    described = final / "tokenizer_config.json"
    settings = {name: value for name, value in json.loads(described.read_text()).items() if name != "backend"}
    settings["tokenizer_class"] = (
        "PreTrainedTokenizerFast"  # the name that transformers 4 and other tools read too
    )
    described.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    loss = heldout_loss(model.float(), heldout_tokens, schedule)
    num_bytes = len(DOCUMENT_SEPARATOR.join(heldout_documents).encode())
    bits_per_byte = loss / math.log(2) * len(heldout_tokens) / num_bytes
    write_card(final, state, perplexity=math.exp(loss), bits_per_byte=bits_per_byte)
    if arguments.install:
        shutil.copytree(final, MODELS_FOLDER / schedule.model, dirs_exist_ok=True)


def describe(model: PreTrainedModel) -> str:
    """What the model consists of, in words."""
    config, layers = model.config, find_moe_layers(model)
    num_dense, num_shared = config.num_hidden_layers - len(layers), getattr(config, "n_shared_experts", 0)
    parts = [
        f"{len(layers)} layers x {layers[0].num_experts} experts x {layers[0].width} atomic experts",
        f"top-{config.num_experts_per_tok}",
    ]
    if num_shared:
        parts.append(f"beside {num_shared} shared experts")
    if num_dense:
        parts.append(f"after {num_dense} dense layer{'s' if num_dense > 1 else ''}")
    return ", ".join([*parts, f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"])


def write_card(folder: Path, state: TrainingState, *, perplexity: float, bits_per_byte: float) -> None:
    """README.md of the model folder: what it is, how it was made, what it reached."""
    schedule = state.schedule
    rows = "\n".join(
        f"| {r['step']} | {r['train_loss']:.3f} | {r['heldout_perplexity']:.2f} | {r['seconds']:.0f} |"
        for r in state.log
    )
    (folder / "README.md").write_text(f"""# {schedule.model}
A small Mixture-of-Experts language model for trying out pruning without a network;
a test object, not a useful language model.
{describe(state.model)}, bfloat16.

Trained on the docstrings of Python {platform.python_version()}'s standard library (corpus `pydocs`,
split `train`) by

    python experiments/builtin_models/train.py --model {schedule.model} --steps {schedule.num_steps}

with `{json.dumps(asdict(schedule))}`.

Perplexity on the held-out documents (windows of {schedule.sequence_length} tokens, bfloat16 weights,
computed in float32):
**{perplexity:.2f}** with its vocabulary of {VOCABULARY_SIZE} tokens; {bits_per_byte:.3f} bits per byte.

| step | train loss (with router auxiliary loss) | held-out perplexity | seconds |
|---|---|---|---|
{rows}
""")


if __name__ == "__main__":
    main()

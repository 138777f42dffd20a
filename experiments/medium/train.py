"""Train a Qwen3-MoE-like model of about 130 million parameters on documentation, to be pruned.

Run:  python -m experiments.medium.train --text outputs/medium/text --prepare         (the text: text.py)
      python -m experiments.medium.train --minutes 6                                  on a GPU
Out:  outputs/medium/model: tokens.safetensors and tokenizer/, all that the second command reads (tokens.py);
      state.safetensors (for resuming), final/ (bfloat16 model, tokenizer, card).

Seeded and resumable: the order of the text depends on (seed, step) alone. Matrix products are in bfloat16;
the weights that the optimizer changes are float32. A run whose minutes are over saves its state, and goes on
where it was when it is started again with the same schedule; `--toy` is a small one for a CPU.
Shape letters: N sequences, W window.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from experiments.medium.tokens import TOKENS, prepare

MAX_WINDOWS = 4096  # that a loss is measured on
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass(frozen=True)
class Schedule:
    """What determines the weights, beside the text.

    64 experts of width 256 at D = 512 would be 302 million parameters in 12 layers; width 96 makes it 113.
    """

    num_layers: int = 12
    num_experts: int = 64
    experts_per_token: int = 8
    width: int = 96
    model_width: int = 512
    num_heads: int = 8
    vocabulary_size: int = 16384
    num_steps: int = 6000
    batch_size: int = 64
    window: int = 512
    learning_rate: float = 1.5e-3
    final_learning_rate_ratio: float = 0.05
    num_warmup_steps: int = 200
    weight_decay: float = 0.1
    load_balancing: float = 0.01
    seed: int = 0


TOY = Schedule(
    num_layers=2, num_experts=8, experts_per_token=2, width=16, model_width=32, num_heads=2,
    vocabulary_size=300, num_steps=6, batch_size=2, window=16, num_warmup_steps=2,
)  # fmt: skip


def build_model(schedule: Schedule) -> Qwen3MoeForCausalLM:
    """Fresh weights, drawn from the seed."""
    torch.manual_seed(schedule.seed)
    config = Qwen3MoeConfig(
        vocab_size=schedule.vocabulary_size,
        hidden_size=schedule.model_width,
        num_hidden_layers=schedule.num_layers,
        num_attention_heads=schedule.num_heads,
        num_key_value_heads=max(1, schedule.num_heads // 2),
        head_dim=schedule.model_width // schedule.num_heads,
        num_experts=schedule.num_experts,
        num_experts_per_tok=schedule.experts_per_token,
        moe_intermediate_size=schedule.width,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=4 * schedule.window,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


class Training:
    """The model in bfloat16, the same weights in float32, Adam's moments, and the log."""

    def __init__(self, schedule: Schedule, text: str, device: torch.device, *, compiled: bool) -> None:
        self.schedule, self.text, self.step = schedule, text, 0
        self.log: list[dict[str, float]] = []
        exact = build_model(schedule)
        self.weights = {name: weight.detach().clone().to(device) for name, weight in exact.named_parameters()}
        self.model = exact.to(device, torch.bfloat16)
        self.model.set_experts_implementation("grouped_mm")
        self.forward = torch.compile(self.model) if compiled else self.model
        matrices = [weight for weight in self.weights.values() if weight.dim() > 1]
        vectors = [weight for weight in self.weights.values() if weight.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95), fused=fused)

    def train_step(self, ids_NW: Tensor) -> Tensor:
        """One step of AdamW; the loss in nats per token, load balancing aside, on the device."""
        outputs = self.forward(input_ids=ids_NW, output_router_logits=True, use_cache=False)
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(logits, ids_NW[:, 1:].flatten())
        (loss + self.schedule.load_balancing * self._imbalance(outputs.router_logits)).backward()
        self._update()
        self.step += 1
        return loss.detach()

    def _imbalance(self, router_logits: Sequence[Tensor]) -> Tensor:
        """Layer by layer: over all layers at once, a dead expert of one is outweighed by the others."""
        schedule = self.schedule
        sizes = (schedule.num_experts, schedule.experts_per_token)
        losses = [load_balancing_loss_func((logits,), *sizes) for logits in router_logits]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _update(self) -> None:
        rate = learning_rate(self.schedule, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parameters = dict(self.model.named_parameters())
        for name, weight in self.weights.items():
            weight.grad = parameters[name].grad.float()
            parameters[name].grad = None
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self.optimizer.step()
        for name, weight in self.weights.items():
            parameters[name].copy_(weight)
            weight.grad = None

    def save(self, folder: Path) -> None:
        tensors = {f"weight.{name}": weight for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            moments = self.optimizer.state[weight]
            tensors |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS}
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"step": str(self.step), "made_by": self._made_by(), "log": json.dumps(self.log)}
        temporary = folder / "state.safetensors.part"
        save_file(on_cpu, temporary, metadata=metadata)
        temporary.rename(folder / "state.safetensors")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from what was saved, if anything was.

        Raises:
            SystemExit: it was made by another schedule or text.
        """
        path = folder / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if metadata["made_by"] != self._made_by():
            raise SystemExit(
                f"{path} was made with another schedule or text; remove it or choose another --output"
            )
        self.step, self.log = int(metadata["step"]), json.loads(metadata["log"])
        tensors = load_file(path)
        parameters = dict(self.model.named_parameters())
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            parameters[name].copy_(weight)
            state = {moment: tensors[f"{moment}.{name}"].to(weight.device) for moment in MOMENTS}
            self.optimizer.state[weight] = {"step": torch.tensor(float(self.step)), **state}

    def _made_by(self) -> str:
        return json.dumps([asdict(self.schedule), self.text], sort_keys=True)


def learning_rate(schedule: Schedule, step: int) -> float:
    """Linear warm-up, then cosine to final_learning_rate_ratio of the peak."""
    if step < schedule.num_warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.num_warmup_steps
    done = (step - schedule.num_warmup_steps) / max(1, schedule.num_steps - schedule.num_warmup_steps)
    floor = schedule.final_learning_rate_ratio
    return schedule.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def sample_batch(tokens_T: Tensor, schedule: Schedule, step: int) -> Tensor:
    """(N, W) windows at random places, a function of (seed, step) alone."""
    generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
    last = len(tokens_T) - schedule.window
    start_N = torch.randint(last + 1, (schedule.batch_size, 1), generator=generator)
    place_NW = start_N + torch.arange(schedule.window)
    return tokens_T[place_NW.to(tokens_T.device)].long()


@torch.no_grad()
def mean_loss(model: Qwen3MoeForCausalLM, tokens_T: Tensor, schedule: Schedule) -> float:
    """Mean next-token cross-entropy in nats over non-overlapping windows, the first if there are many."""
    num_windows = min(len(tokens_T) // schedule.window, MAX_WINDOWS)
    windows_NW = tokens_T[: num_windows * schedule.window].view(num_windows, -1)
    total = torch.zeros((), dtype=torch.float64, device=tokens_T.device)
    for held_NW in windows_NW.split(schedule.batch_size):
        ids_NW = held_NW.long()
        logits = model(input_ids=ids_NW, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        total += F.cross_entropy(logits, ids_NW[:, 1:].flatten(), reduction="sum")
    return total.item() / windows_NW[:, 1:].numel()


def train(
    training: Training, tokens: Mapping[str, Tensor], folder: Path, *, seconds: float, every: int
) -> bool:
    """Train until the last step or the end of the time; whether the last step was reached."""
    schedule, started = training.schedule, time.perf_counter()
    before = training.log[-1]["seconds"] if training.log else 0.0
    while training.step < schedule.num_steps:
        loss = training.train_step(sample_batch(tokens["train"], schedule, training.step))
        is_last = training.step == schedule.num_steps
        spent = time.perf_counter() - started
        if training.step % every == 0 or is_last or spent > seconds:
            row = {"step": training.step, "train_loss": loss.item(), "seconds": before + spent}
            row["heldout_loss"] = mean_loss(training.model, tokens["heldout"], schedule)
            training.log.append(row)
            training.save(folder)
            print(row, flush=True)
        if spent > seconds and not is_last:
            return False
    return True


def finish(
    training: Training, tokenizer: PreTrainedTokenizerFast, tokens: Mapping[str, Tensor], folder: Path
) -> None:
    """Write the model as a Hugging Face folder, with a card."""
    model, schedule = training.model, training.schedule
    model.set_experts_implementation("eager")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.set_experts_implementation("grouped_mm")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    losses = [mean_loss(model, tokens[name], schedule) for name in ("heldout", "kept_out")]
    heldout, kept_out = map(math.exp, losses)
    (folder / "README.md").write_text(
        f"""# medium
A Qwen3-MoE-like model of {size:.1f} million parameters for pruning experiments, trained on documentation
(experiments/medium/text.py names the packages and their licences); a test object, not a useful language
model.

`{json.dumps(asdict(schedule))}`; {training.step} steps, {training.log[-1]["seconds"]:.0f} s.

Perplexity in windows of {schedule.window} tokens: {heldout:.2f} on documents held out of the same packages,
{kept_out:.2f} on the package that nothing is trained on.
"""
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=Path("outputs/medium/text"))
    parser.add_argument("--output", type=Path, default=Path("outputs/medium/model"))
    parser.add_argument("--prepare", action="store_true", help="only make tokens and tokenizer of the text")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on later")
    parser.add_argument("--evaluate-every", type=int, default=1000)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--toy", action="store_true", help="a model of two small layers, a few steps")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    schedule = TOY if arguments.toy else Schedule()
    if arguments.steps is not None:
        schedule = replace(schedule, num_steps=arguments.steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = prepare(schedule.vocabulary_size, arguments.text, arguments.output)
    tokens = load_file(arguments.output / TOKENS, device=str(device))
    print({name: len(tokens_T) for name, tokens_T in tokens.items()}, flush=True)
    if arguments.prepare:
        return
    compiled = device.type == "cuda" and not arguments.no_compile
    training = Training(schedule, text, device, compiled=compiled)
    training.load(arguments.output)
    options: dict[str, Any] = {"seconds": 60 * arguments.minutes, "every": arguments.evaluate_every}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.output / "tokenizer")
    if train(training, tokens, arguments.output, **options):
        finish(training, tokenizer, tokens, arguments.output / "final")


if __name__ == "__main__":
    main()

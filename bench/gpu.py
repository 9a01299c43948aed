"""Reading, steering and monitoring on one CUDA card, with random weights of real shapes: nothing is downloaded.

    python bench/gpu.py                                      both models; nothing new is begun after eight minutes
    python bench/gpu.py --models Llama-3.1-8B --minutes 4
    python bench/gpu.py --tiny --device cpu                  a tiny model on the processor: does the script work?

It needs torch, transformers and this repository, and downloads nothing. Weights are random, in the shapes of :data:`SHAPES`; the
tokenizer is made on the spot, one token a word. What is measured costs what it costs with trained weights.

* **Peak**: the fastest product of large bfloat16 matrices on this card, now.
* **Reading**: the mean residual at two thirds of the depth from the 50th token on, of texts of 80 to 300 tokens, through
  ``engine.read`` and through the loop that everybody writes first (``output_hidden_states=True``, padded batches of 8 in order of
  arrival). Tokenising and the means are in the time. The bound counts the texts' own tokens alone, through the blocks needed.
* **Generation**: replies of equal length behind prompts of equal length, at several batch sizes, plain, steered at one layer,
  with all emotions monitored there, and both: through ``engine.run``, and inside a CUDA graph. The engine has no graph of its own
  yet: here a step of the model over a static cache is captured with a hook that adds rows of a table and projects onto
  directions, all of it buffers that stay where they are, as a worker of a serving engine would have it.
  ``model.generate`` stands beside.

Everything is timed several times after a first run that does not count. Results are kept card by card in
``bench/results/gpu.json``, after every step, and printed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_tables import LIKE, reading_share, tables
from static_decoder import StaticDecoder

EMOTIONS = 171
STRENGTH = 0.05
FIRST_TOKEN = 50
TEXT_TOKENS = (80, 300)
SEED = 20261129


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    family: str
    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    theta: float

    @property
    def layer(self) -> int:
        """The layer at two thirds of the depth, as ``ModelInfo.default_layer`` has it."""
        return min(self.layers - 1, round(self.layers * 2 / 3))

    def flops(self, lengths: Sequence[int]) -> float:
        """Multiplications and additions that reading needs: the blocks up to the layer, a gated MLP and causal attention."""
        queries, keys = self.width, self.kv_heads * self.width // self.heads
        per_token = 2 * (self.width * (2 * queries + 2 * keys) + 3 * self.width * self.hidden)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return (self.layer + 1) * (per_token * sum(lengths) + 4 * queries * pairs)


SHAPES = {
    "Llama-3.1-8B": Shape("llama", 32, 4096, 14336, 32, 8, 128_256, 500_000.0),
    "Qwen2.5-32B": Shape("qwen2", 64, 5120, 27648, 40, 8, 152_064, 1_000_000.0),
}
TINY = {"tiny": Shape("llama", 6, 64, 128, 4, 2, 1000, 10_000.0)}


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        texts: That are read, for each model.
        batches: Rows that are generated together.
        prompt, tokens: Of each reply.
        times: How often everything is timed.
        deadline: ``time.monotonic()`` after which nothing new is begun.
    """

    texts: int
    batches: tuple[int, ...]
    prompt: int
    tokens: int
    times: int
    deadline: float


# ── a model, its tokenizer, texts ──


def random_model(shape: Shape, device: str, dtype: str) -> Any:
    """A model of this shape whose weights are made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape.family]
    config = kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # nothing ends a reply early
    return model.eval()


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer for texts of :func:`words`: one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<unk>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    backend = Tokenizer(models.WordLevel(vocab=ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", padding_side="left")


def words(count: int, vocabulary: int, rng: random.Random) -> str:
    """A text of so many tokens."""
    return " ".join(f"w{rng.randrange(2, vocabulary)}" for _ in range(count))


# ── clocks ──


class Device:
    """Where everything runs: its clock, its memory, its peak."""

    def __init__(self, name: str) -> None:
        self.name, self.cuda = name, name.startswith("cuda")

    def seconds(self, run: Callable[[], Any]) -> float:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def memory_gb(self, run: Callable[[], Any]) -> float | None:
        """Most memory that a run takes besides what is there; None on a processor."""
        import torch

        if not self.cuda:
            run()
            return None
        self.clear()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def clear(self) -> None:
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def peak(self, shapes: Sequence[tuple[int, int, int]], dtype: str) -> float:
        """The fastest of these products (rows, inner, columns), in 10^12 operations per second."""
        import torch

        best = 0.0
        for rows, inner, columns in shapes:
            inputs, weights = (torch.randn(n, inner, device=self.name, dtype=getattr(torch, dtype)) for n in (rows, columns))

            def product(inputs: Any = inputs, weights: Any = weights) -> None:
                for _ in range(10):
                    torch.nn.functional.linear(inputs, weights)

            product()
            seconds = min(self.seconds(product) for _ in range(5))
            best = max(best, 10 * 2 * rows * inner * columns / seconds / 1e12)
        return best


# ── reading ──


def read(engine: Any, shape: Shape, plan: Plan, device: Device, peak: float) -> dict[str, Any]:
    """How fast texts are read, by us and by the ordinary loop, and whether both find the same."""
    import numpy as np

    from affectlens.engine import Readout, Request, Where

    rng = random.Random(SEED)
    lengths = [rng.randint(*TEXT_TOKENS) for _ in range(plan.texts)]
    texts = [words(length, shape.vocabulary, rng) for length in lengths]
    readout = Readout((shape.layer,), Where(after=FIRST_TOKEN - 1), "mean")

    def ours() -> np.ndarray:
        return np.stack([reading.values[0] for reading in engine.read(texts, readout)])

    def loop() -> np.ndarray:
        return ordinary_loop(engine, texts, shape.layer)

    found: dict[str, Any] = {
        "texts": len(texts),
        "tokens": sum(lengths),
        "bound": peak * 1e12 / (shape.flops(lengths) / sum(lengths)),
        "layouts": min(device.seconds(lambda: engine.layouts.of_all([Request(text) for text in texts])) for _ in range(3)),
        "ways": {},
    }
    means = {}
    for key, label, way in (
        ("loop", "ordinary loop: `output_hidden_states=True`, padded batches of 8", loop),
        ("ours", "**affectlens**, `engine.read`", ours),
    ):
        memory = device.memory_gb(lambda key=key, way=way: means.__setitem__(key, way()))
        times = [device.seconds(way) for _ in range(plan.times)]
        found["ways"][key] = {"label": label, "seconds": times, "memory_gb": memory}
    a, b = (means[key] / np.linalg.norm(means[key], axis=-1, keepdims=True) for key in ("loop", "ours"))
    found["cosine"] = float((a * b).sum(-1).min())
    return found


def ordinary_loop(engine: Any, texts: Sequence[str], layer: int) -> Any:
    """Means at a layer by the loop that everybody writes first."""
    import numpy as np
    import torch

    means = []
    engine.tokenizer.padding_side = "right"
    with torch.inference_mode():
        for start in range(0, len(texts), 8):
            encoded = engine.tokenizer(list(texts[start : start + 8]), padding=True, return_tensors="pt").to(engine.device)
            encoded.pop("token_type_ids", None)
            states = engine.model(**encoded, output_hidden_states=True).hidden_states[layer + 1]
            for row, mask in zip(states, encoded["attention_mask"].bool(), strict=True):
                means.append(row[mask][FIRST_TOKEN - 1 :].float().mean(0).cpu().numpy())
    engine.tokenizer.padding_side = "left"
    return np.stack(means)


# ── generating ──


def generate(engine: Any, shape: Shape, plan: Plan, device: Device) -> dict[str, Any]:
    """How fast replies are generated, plain, steered and monitored, by the engine and inside a CUDA graph."""
    rng = random.Random(SEED)
    prompts = [words(plan.prompt, shape.vocabulary, rng) for _ in range(max(plan.batches))]
    if engine.generate_rows > 1:
        engine.generate_rows = max(plan.batches)
    found: dict[str, Any] = {"prompt": plan.prompt, "tokens": plan.tokens, "emotions": EMOTIONS, "layer": shape.layer, "ways": {}}
    for batch in plan.batches:
        ways = _ways(engine, shape, plan, prompts[:batch], found["ways"])
        _time(ways, batch, found["ways"], plan, device)
        device.clear()
        if time.monotonic() > plan.deadline:
            found["cut"] = f"the time was over after batch {batch}"
            break
    return found


@dataclass
class Way:
    """One way to answer the prompts of a batch."""

    run: Callable[[], list[list[int]]]
    close: Callable[[], None] = lambda: None


def _ways(engine: Any, shape: Shape, plan: Plan, prompts: Sequence[str], entries: dict[str, Any]) -> dict[str, Way]:
    import numpy as np
    import torch
    from transformers import GenerationConfig

    from affectlens.engine import Readout, Request, Sampling, Steering, Term, Where

    ids = engine.tokenizer(list(prompts), return_tensors="pt")["input_ids"].to(engine.device)
    drawn = np.random.default_rng(SEED).normal(size=(EMOTIONS, shape.width))
    directions = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    every = next(engine.read(prompts[:1], Readout((shape.layer,), Where(after=1), "norm"))).values
    term = Term("push", STRENGTH, (shape.layer,), (shape.layer,), directions[:1], every.astype(np.float32))
    steering, readouts = Steering((term,)), (Readout((shape.layer,), Where("response"), "none", directions[None]),)
    row = torch.from_numpy(steering.at_layer(shape.layer)[0][0].vector).to(engine.device, engine.model.dtype)
    push, onto = row.expand(len(prompts), -1).contiguous(), torch.from_numpy(directions).to(engine.device)
    sampling = Sampling(max_tokens=plan.tokens, temperature=0)
    config = GenerationConfig(
        do_sample=False,
        min_new_tokens=plan.tokens,
        max_new_tokens=plan.tokens,
        eos_token_id=None,
        pad_token_id=engine.tokenizer.pad_token_id,
    )

    def peer() -> list[list[int]]:
        with torch.inference_mode():
            out = engine.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return out[:, ids.shape[1] :].tolist()

    def ours(steered: bool, monitored: bool) -> Way:
        how = {"steering": steering if steered else Steering(), "readouts": readouts if monitored else ()}

        def run() -> list[list[int]]:
            results = list(engine.run([Request(prompt, sampling=sampling, **how) for prompt in prompts]))
            return [list(result.layout.ids[result.layout.n_prompt :]) for result in results]

        return Way(run)

    def static(steered: bool, monitored: bool, captured: bool) -> Way:
        made: list[StaticDecoder] = []

        def run() -> list[list[int]]:
            with torch.no_grad():
                if not made:
                    sizes = {"prompt": plan.prompt, "tokens": plan.tokens, "layer": shape.layer}
                    taps = {"push": push if steered else None, "onto": onto if monitored else None}
                    made.append(StaticDecoder(engine.model, len(prompts), **sizes, **taps))
                    if captured:
                        made[0].capture(ids)
                return made[0].run(ids)

        def close() -> None:
            for decoder in made:
                decoder.close()
            made.clear()

        return Way(run, close)

    graph = "CUDA graph" if ids.is_cuda else "static buffers, not captured (no CUDA)"
    kinds = {"": (False, False), "steer": (True, False), "read": (False, True), "both": (True, True)}
    said = {"": "plain", "steer": "steered", "read": f"{EMOTIONS} emotions", "both": f"steered, {EMOTIONS} emotions"}
    listed = {"generate": ("transformers, `model.generate`", Way(peer))}
    listed |= {kind or "plain": (f"**affectlens**, {said[kind]}", ours(*how)) for kind, how in kinds.items()}
    listed["static"] = ("static buffers, step by step, plain", static(False, False, captured=False))
    listed |= {f"graph-{kind}".strip("-"): (f"{graph}, {said[kind]}", static(*how, captured=True)) for kind, how in kinds.items()}
    for key, (label, _) in listed.items():
        entries.setdefault(key, {"label": label, "seconds": {}, "memory_gb": {}, "same": {}, "problems": {}})
    return {key: way for key, (_, way) in listed.items()}


def _time(ways: dict[str, Way], batch: int, entries: dict[str, Any], plan: Plan, device: Device) -> None:
    """Time all ways; one that fails is left out, and says why.

    A decoder's hook is there from its first run to its end: each is made, timed and taken away before the next one.
    """
    import torch

    replies: dict[str, list[list[int]]] = {}
    for key, way in ways.items():
        entry = entries[key]
        try:
            entry["memory_gb"][str(batch)] = device.memory_gb(lambda key=key, way=way: replies.__setitem__(key, way.run()))
            if key in LIKE:
                like = replies.get(LIKE[key], [[]] * batch)
                entry["same"][str(batch)] = sum(a == b for a, b in zip(replies[key], like, strict=True)) / batch
            entry["seconds"][str(batch)] = [device.seconds(way.run) for _ in range(plan.times)]
        except (RuntimeError, torch.OutOfMemoryError, TypeError, AttributeError, ValueError) as error:
            entry["problems"][str(batch)] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            print(f"  {key}, batch {batch}: {entry['problems'][str(batch)]}", file=sys.stderr, flush=True)
        finally:
            way.close()
            device.clear()
        if times := entry["seconds"].get(str(batch)):
            rate = batch * plan.tokens / statistics.median(times)
            print(f"  {key:12} batch {batch:3}: {rate:9,.1f} tokens/s", file=sys.stderr, flush=True)


# ── running ──


def measure(short: bool = False) -> dict[str, Any]:
    """Measure both models on the card; the short form runs a tiny one on the processor."""
    return measured(arguments(["--tiny", "--device", "cpu"] if short else []))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the models on a card; what is there is kept after every step."""
    import torch

    from affectlens.engines.hf import HFEngine
    from affectlens.runs import provenance

    device, began = Device(args.device), time.monotonic()
    shapes = TINY if args.tiny else SHAPES
    properties = torch.cuda.get_device_properties(0) if device.cuda else None
    card = properties.name if properties else "no card (processor)"
    result = json.loads(args.out.read_text()) if args.out and args.out.exists() else {"benchmark": "gpu", "cards": {}}
    own = result["cards"].setdefault(card, {"models": {}})
    own |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "memory_gb": properties.total_memory / 1e9 if properties else 0.0,
        "dtype": args.dtype,
        "provenance": provenance(),
    }

    def keep() -> None:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    chosen = list(shapes) if args.tiny else args.models
    for number, name in enumerate(chosen):
        # What is left is shared out; the largest model comes last and has what the others did not need.
        left = 60 * args.minutes - (time.monotonic() - began)
        deadline = time.monotonic() + left / (len(chosen) - number)
        plan = Plan(8, (1, 2), 4, 4, 1, deadline) if args.tiny else Plan(256, (1, 32, 256), 64, 32, 3, deadline)
        shape = shapes[name]
        print(f"{name}: making weights", file=sys.stderr, flush=True)
        model = random_model(shape, args.device, args.dtype)
        squares = (256,) if args.tiny else (8192, 16384)
        products = [(n, n, n) for n in squares] + [
            (squares[-1], shape.width, shape.hidden),
            (squares[-1], shape.hidden, shape.width),
        ]
        peak = device.peak(products, args.dtype)
        device.clear()
        engine = HFEngine.around(model, tokenizer=word_tokenizer(shape.vocabulary))
        entry = own["models"][name] = {
            "shape": {**asdict(shape), "layer": shape.layer},
            "parameters": engine.info.n_parameters or sum(p.numel() for p in model.parameters()),
            "peak_tflops": peak,
            "checks": [list(check) for check in engine.info.checks],
        }
        entry["reading"] = read(engine, shape, plan, device, peak)
        keep()
        print(f"  reading at {reading_share(entry):.0%} of the bound, peak {peak:.0f} TFLOP/s", file=sys.stderr, flush=True)
        entry["generation"] = generate(engine, shape, plan, device)
        keep()
        del engine, model
        device.clear()
    return result


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing new is begun after so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default=None, help="bfloat16; float32 for --tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few tokens; results go only where --out says")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if args.tiny else "bfloat16")
    if args.out is None and not args.tiny:
        args.out = Path(__file__).resolve().parent / "results" / "gpu.json"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: run this where there is one, or try the script with --tiny --device cpu", file=sys.stderr)
        return 2
    print(tables(measured(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

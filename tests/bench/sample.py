"""Speed of sampling against `transformers.generate` on the same weights, and against itself at longer prompts.

    python tests/bench/sample.py --layers 8 --width 512 --vocabulary 8192 --new-tokens 128

Both write the same number of tokens after the same prompts, in alternation; printed is the median of the ratios.
Weights are random. Greedy ids are compared.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from mmtrain.config import ModelConfig
from mmtrain.generate import Grammar, Prompt, SamplingSettings, sample
from mmtrain.models import Decoder, build_model
from mmtrain.tokens import Vocabulary

PREFIXES = (64, 128, 256, 512, 1024, 2048)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processor-time", action="store_true", help="not wall time: for a machine that others use")
    parser.add_argument("--only", choices=("peer", "prefix"), help="one of the two tables")
    return parser.parse_args()


def build(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Decoder, transformers.PreTrainedModel]:
    """The same random Llama twice."""
    positions = max(PREFIXES) + args.new_tokens + 1
    config = ModelConfig(
        "llama", args.layers, args.width, args.heads, args.kv_heads, tie_embeddings=False, init_std=0.05
    )
    config.zero_init_outputs = False
    ours = build_model(config, args.vocabulary, positions)
    ours.initialize(0)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.width,
            intermediate_size=config.feed_forward_width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=positions,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    peer.load_state_dict(peer_weights(ours, config))
    return ours.to(args.device, dtype).eval(), peer.to(args.device, dtype).eval()


def peer_weights(model: Decoder, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names."""
    ours = model.state_dict()
    kv = config.num_kv_heads * config.head_size
    theirs = {
        "model.embed_tokens.weight": ours["token_embedding.weight"],
        "model.norm.weight": ours["final_norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    for layer in range(config.layers):
        a, b = f"model.layers.{layer}.", f"blocks.{layer}."
        q, k, v = ours[b + "attention.qkv.weight"].split([config.width, kv, kv])
        gate, up = ours[b + "ffn.wide.weight"].chunk(2)
        theirs |= {a + f"self_attn.{name}_proj.weight": w for name, w in zip("qkv", (q, k, v), strict=True)}
        theirs |= {
            a + "self_attn.o_proj.weight": ours[b + "attention.out.weight"],
            a + "mlp.gate_proj.weight": gate,
            a + "mlp.up_proj.weight": up,
            a + "mlp.down_proj.weight": ours[b + "ffn.out.weight"],
            a + "input_layernorm.weight": ours[b + "attention_norm.weight"],
            a + "post_attention_layernorm.weight": ours[b + "ffn_norm.weight"],
        }
    return theirs


def free_text(vocabulary: Vocabulary, length: int) -> Grammar:
    """Exactly `length` ids of any kind but specials: what `transformers.generate` writes without an end."""
    return Grammar.picture(vocabulary, np.arange(length))


def timed(run: Callable[[], Any], args: argparse.Namespace) -> tuple[float, Any]:
    """Seconds and result."""
    clock = time.process_time if args.processor_time else time.perf_counter
    start = clock()
    result = run()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def against_peer(args: argparse.Namespace) -> None:
    """One line per dtype, batch and way of drawing."""
    n = args.new_tokens
    # All ids are image codes, except the first 7: the peer's head has the same width.
    vocabulary = Vocabulary(1, args.vocabulary - 7, 0)
    print(f"{'dtype':<10}{'batch':>6} {'drawing':<12}{'ours, ms':>10}{'peer, ms':>10}{'ratio':>7}  per token of a row")
    for dtype in args.dtypes:
        ours, peer = build(args, getattr(torch, dtype))
        for batch in args.batches:
            ids = np.random.default_rng(0).integers(7, args.vocabulary, (batch, args.prompt))
            prompts = [Prompt((row,), free_text(vocabulary, n), (0, i)) for i, row in enumerate(ids)]
            inputs = {"input_ids": torch.tensor(ids, device=args.device)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            for drawing, settings, options in (
                ("greedy", SamplingSettings(temperature=0), {"do_sample": False}),
                ("top-p 0.95", SamplingSettings(top_p=0.95), {"do_sample": True, "top_p": 0.95, "top_k": 0}),
            ):
                def write() -> np.ndarray:
                    return np.stack([s.tokens for s in sample(ours, prompts, settings)])  # noqa: B023

                def generate() -> np.ndarray:
                    written = peer.generate(**inputs, max_new_tokens=n, min_new_tokens=n, **options)  # noqa: B023
                    return written[:, args.prompt :].cpu().numpy()

                pairs = []
                for _ in range(args.rounds + 1):
                    (a, mine), (b, theirs) = timed(write, args), timed(generate, args)
                    pairs.append((a, b))
                a, b = (1000 * statistics.median(x) / n for x in zip(*pairs[1:], strict=True))
                ratio = statistics.median(b / a for a, b in pairs[1:])
                same = f"{(mine == theirs).mean():.1%} of ids equal" if drawing == "greedy" else ""
                print(f"{dtype:<10}{batch:>6} {drawing:<12}{a:>10.2f}{b:>10.2f}{ratio:>7.2f}  {same}", flush=True)


def over_prefixes(args: argparse.Namespace) -> None:
    """Time of a token after prompts of growing length, against the share of attention in the bytes that it reads.

    Medians over all tokens but the first of all rounds, prefixes in turn.
    """
    n = min(args.new_tokens, 32)
    vocabulary = Vocabulary(1, args.vocabulary - 7, 0)
    clock = time.process_time if args.processor_time else time.perf_counter
    print(f"{'dtype':<10}{'batch':>6}{'prefix':>8}{'ms/token':>10}{'against 64':>12}{'bytes against 64':>18}")
    for dtype in args.dtypes:
        ours, _ = build(args, getattr(torch, dtype))
        weights = sum(p.numel() for name, p in ours.named_parameters() if "embedding" not in name)
        for batch in args.batches:
            seconds: dict[int, list[float]] = {prefix: [] for prefix in PREFIXES}
            for _ in range(args.rounds):
                for prefix in PREFIXES:
                    ids = np.random.default_rng(0).integers(7, args.vocabulary, (batch, prefix))
                    prompts = [Prompt((row,), free_text(vocabulary, n + 1), (0,)) for row in ids]
                    times: list[float] = []
                    sample(ours, prompts, SamplingSettings(temperature=0), lambda *_: times.append(clock()))  # noqa: B023
                    seconds[prefix] += np.diff(times).tolist()
            cached = {prefix: 2 * args.layers * (args.width * args.kv_heads // args.heads) * (prefix + n / 2) * batch
                      for prefix in PREFIXES}  # fmt: skip
            first, least = statistics.median(seconds[PREFIXES[0]]), weights + cached[PREFIXES[0]]
            for prefix in PREFIXES:
                now, larger = statistics.median(seconds[prefix]), (weights + cached[prefix]) / least
                row = f"{dtype:<10}{batch:>6}{prefix:>8}{1000 * now:>10.2f}{now / first:>12.2f}{larger:>18.2f}"
                print(row, flush=True)


def main() -> None:
    args = arguments()
    transformers.logging.set_verbosity_error()
    if args.only != "prefix":
        against_peer(args)
    if args.only != "peer":
        over_prefixes(args)


if __name__ == "__main__":
    main()

"""Train a small language model on books: one that nothing in soco was chosen by.

    python benchmarks/train.py --data DIR --architecture qwen3 --output WORK/qwen3-books

``DIR`` holds ``books/``. All books but the one that is evaluated on (benchmarks/protocol.py) are
read, by a byte-level BPE tokenizer of 1,024 tokens that is trained on them as well. The folder is
an ordinary one of transformers'; 1,600 steps take a quarter of an hour on one core with AMX.
"""

import argparse
import gzip
import math
import time
from pathlib import Path

import torch
from protocol import BOOKS, LENGTH
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
# Neither is like the models that soco's defaults were measured on: layer norms, biases, parallel
# branches, GELU; and grouped queries, norms of queries and keys, embeddings tied to the head.
ARCHITECTURES = {
    "gpt_neox": {
        "hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 6,
        "intermediate_size": 768, "rotary_pct": 0.5,
    },
    "qwen3": {
        "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 512,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
BATCH = 16  # windows of LENGTH tokens
RATE, WARMUP, LAST = 2e-3, 50, 0.02  # of AdamW; steps; what is left of the rate at the end


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="qwen3")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    books = [
        gzip.decompress(path.read_bytes()).decode("utf-8")
        for path in sorted((arguments.data / "books").glob("*.gz"))
        if path.name != Path(BOOKS[1]).name
    ]
    tokenizer = trained_tokenizer(books)
    pieces = [book[i : i + 200_000] for book in books for i in range(0, len(book), 200_000)]
    encoded = tokenizer.backend_tokenizer.encode_batch(pieces)
    ids = torch.cat([torch.tensor(each.ids, dtype=torch.int16) for each in encoded])
    config = AutoConfig.for_model(
        arguments.architecture, vocab_size=VOCABULARY, max_position_embeddings=2 * LENGTH,
        bos_token_id=0, eos_token_id=0, **ARCHITECTURES[arguments.architecture],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(books)} books, {len(ids):,} tokens, {count:,} parameters", flush=True)
    train(model, ids, arguments.steps)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


def trained_tokenizer(books: list[str]) -> PreTrainedTokenizerFast:
    """Of the beginnings of all books."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((book[:300_000] for book in books), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def train(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> None:
    """AdamW in bfloat16, a warm-up and half a cosine."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    begin = time.perf_counter()
    for step in range(steps):
        cosine = LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine * min(1.0, (step + 1) / WARMUP)
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,))
        windows = torch.stack([ids[at : at + LENGTH].long() for at in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - begin
            print(f"step {step + 1}: {loss.item():.3f} nats per token, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()

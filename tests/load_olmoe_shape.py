"""Load what tests/make_olmoe_shape.py wrote, under a limit on memory, and generate.

    python tests/load_olmoe_shape.py FOLDER

Loads it in 4 bits with 8 GB, then in 8 bits with 12 GB, each in a process of its own whose
address space is limited to that (as `ulimit -v` does); prints the most memory that was resident,
the time to load and tokens per second.
"""

import argparse
import resource
import subprocess
import sys
import time

LIMITS = {4: 8, 8: 12}  # 10^9 bytes, by bits
TOKENS = 16


def load(folder: str, bits: int) -> None:
    """In the process that is limited."""
    import torch

    import moeprof

    start = time.perf_counter()
    model = moeprof.load(folder, bits=bits)
    loading = time.perf_counter() - start
    size = sum(t.nbytes for t in model.state_dict().values())
    ids = torch.randint(0, model.config.vocab_size, (1, 16))
    settings = dict(do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids))
    with moeprof.patch(model, linears=True), torch.inference_mode():
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, **settings)
        start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **settings)
        rate = TOKENS / (time.perf_counter() - start)
    assert out.shape[1] == 16 + TOKENS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{bits} bits, at most {LIMITS[bits]} GB: weights {size / 1e9:.2f} GB, peak resident "
        f"{peak / 1e9:.2f} GB, loaded in {loading:.0f} s, {rate:.1f} tokens/s "
        f"({torch.get_num_threads()} threads)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--bits", type=int, choices=[*LIMITS], help="in this process, no limit")
    arguments = parser.parse_args()
    if arguments.bits:
        load(arguments.folder, arguments.bits)
        return
    for bits, limit in LIMITS.items():
        command = [sys.executable, __file__, arguments.folder, "--bits", str(bits)]
        size = limit * 10**9
        subprocess.run(
            command,
            check=True,
            preexec_fn=lambda size=size: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
        )


if __name__ == "__main__":
    main()

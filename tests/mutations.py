"""Do the tests see small mistakes? Each mutation below is one; the tests named must fail with it.

    python tests/mutations.py            all of them, in turn
    python tests/mutations.py 3 17       these
    python tests/mutations.py --list     their numbers

One changes a file of this checkout for the time of its tests, so nothing else may run in it
meanwhile. A mutation of C is built in place, and the extensions of before are put back. What no
test saw is printed at the end, and the exit status is then 1: such a mutation needs a test.
"""

import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    file: str
    old: str  # stands once in the file
    new: str
    tests: str  # files below tests/, or expressions of pytest's -k behind them


# fmt: off
MUTATIONS = [
    # ---- C: weights in 8 and 4 bits ----
    Mutation("csrc/scalar/encode_scalar.c", "-8, 7)", "-7, 7)", "test_quantized_kernels.py"),
    Mutation("csrc/scalar/quantize_scalar.c", "to->minus_sum -=", "to->minus_sum +=",
             "test_quantized_kernels.py"),
    Mutation("csrc/x86/quantized_avx2.c", "vi_set(8 * minus_sum)", "vi_set(7 * minus_sum)",
             "test_quantized_kernels.py"),
    Mutation("csrc/x86/quantized_amxint8.c", "sums[g % 2] + r", "sums[0] + r",
             "test_quantized_emulated.py -k amxint8"),
    # ---- C: routers ----
    Mutation("csrc/routers/shared.h", "value > most", "value >= most",
             "test_router_kernels.py test_router_statistics.py"),
    Mutation("csrc/routers/shared.h", "token->p[r] <= t", "token->p[r] < t",
             "test_router_kernels.py test_router_statistics.py"),
    Mutation("csrc/routers/higher_criticism.c",
             "if (denominator == RANK && last == token->num_experts)", "if (denominator == P)",
             "test_router_statistics.py"),
    Mutation("csrc/routers/kneedle.c", "isinf(d) ? 1", "isinf(d) ? 0", "test_router_kernels.py"),
    Mutation("csrc/routers/local_fdr.c", "<= parameters[0]", "< parameters[0] / 2",
             "test_router_kernels.py"),
    Mutation("csrc/route.c", "rejections < spec->min_k ? spec->min_k", "rejections < 1 ? 1",
             "test_router_kernels.py"),
    Mutation("csrc/route.c", "divisor < enough", "divisor < 0",
             "test_router_kernels.py test_router_properties.py"),
    Mutation("csrc/route.c", "while (row < seen", "while (row > seen", "test_router_kernels.py"),
    Mutation("csrc/null.c", "largest[middle] >= s", "largest[middle] > s",
             "test_router_statistics.py"),
    Mutation("csrc/null.c", "const double bin = floor(s * 128)",
             "const double bin = trunc(s * 128)", "test_router_statistics.py test_null.py"),
    Mutation("csrc/null.c", "sum / (double)finite", "sum / (double)num_experts",
             "test_router_kernels.py test_router_statistics.py"),
    Mutation("csrc/x86/step_up_impl.h", "md_and(vd_eq(left, right), rest_le)",
             "vd_eq(left, right)", "test_kernels.py -k step_up"),
    # ---- C: experts ----
    Mutation("csrc/experts.c", "return id >= 0 && id < num_experts;",
             "return id > 0 && id < num_experts;", "test_experts.py"),
    Mutation("csrc/experts.c", "if (id < -1 || id > E)", "if (id < -2 || id > E + 1)",
             "test_extension_arguments.py test_experts.py"),
    Mutation("csrc/experts.c", "rows += mp_panel_rows(pairs_of(c, a));",
             "rows += pairs_of(c, a);", "test_experts.py"),
    Mutation("csrc/experts.c", "if (w->packed == x.index)", "if (w->packed)",
             "test_experts.py"),
    Mutation("csrc/experts.c", "to[j] += weight * y[r * n + j];", "to[j] = weight * y[r * n + j];",
             "test_experts.py"),
    Mutation("csrc/experts.c", "&l->activation, l->gate ? w->gate : NULL",
             "&l->activation, w->gate", "test_experts.py -k activations"),
    Mutation("csrc/experts.c", "return l->storage == MP_STORED_interleaved ? 2 : 1;", "return 1;",
             "test_experts.py -k stored"),
    Mutation("csrc/experts.c", "hidden_rows(c, first + PANEL_ROWS,", "hidden_rows(c, first,",
             "test_experts.py"),
    Mutation("csrc/experts.c", "x = {act + PANEL_ROWS * row,", "x = {act,", "test_experts.py"),
    Mutation("csrc/experts.c", "if (l->down_bias)", "if (0)", "test_experts.py -k stored"),
    Mutation("csrc/experts.c", "const ptrdiff_t width = l->gate ? 2 * I : I",
             "const ptrdiff_t width = 2 * I", "test_experts.py -k stored"),
    Mutation("csrc/x86/transposed_impl.h", "s.depth = k - i < depth ? k - i : depth;",
             "s.depth = depth;", "test_kernels.py -k transposed"),
    Mutation("csrc/x86/transposed_impl.h", "first < x->count; first += MP_TRANSPOSED_ROWS",
             "first < 1; first += MP_TRANSPOSED_ROWS", "test_kernels.py -k transposed"),
    Mutation("csrc/x86/gemm_impl.h", "CASE(R_OF_ONE, 1, 0)", "CASE(R, 1, 0)",
             "test_kernels.py -k gemm"),
    Mutation("csrc/dense.c", "(char *)out + first * n * size", "(char *)out + first * k * size",
             "test_linears.py -k test_dense"),
    Mutation("csrc/scalar/glu_scalar.c", "x < limit ? limit : x", "x > limit ? x : limit",
             "test_experts.py -k nan_reaches"),
    Mutation("csrc/x86/glu_impl.h", "vf_max(u, vf_set(-a.limit))", "u", "test_kernels.py -k glu"),
    # ---- C: tally ----
    Mutation("csrc/tally.c", "t->reuse[known ? depth : E]++", "t->reuse[depth]++",
             "test_tally.py"),
    Mutation("csrc/tally.c", "t->skipped[padding] += s->slots - count",
             "t->skipped[padding] += s->slots", "test_tally.py"),
    Mutation("csrc/tally.c", "lanes[0] -= p[e] > 0", "lanes[0] += p[e] > 0", "test_tally.py"),
    Mutation("csrc/tally.c", "if (padding || !t->has_pairs)", "if (!t->has_pairs)",
             "test_tally.py"),
    # ---- activations ----
    Mutation("moeprof/models/families/activations.py", "torch.allclose(got[0].double(), expected",
             "torch.allclose(expected, expected", "test_activations.py"),
    Mutation("moeprof/models/families/activations.py",
             "seen[:3] != (numbers, function, by_turns)",
             "seen[1:3] != (function, by_turns)", "test_activations.py -k changes"),
    Mutation("moeprof/backends/tables.py", "return 3 if self.gated else 2", "return 3",
             "test_activations.py"),
    Mutation("moeprof/backends/tables.py", '(1 if order == "interleaved" else I) * size',
             "I * size", "test_activations.py -k experts_of_transformers"),
    Mutation("moeprof/models/families/activations.py",
             '"_default_apply_gate" and not by_turns', '"_default_apply_gate"',
             "test_activations.py -k halves"),
    Mutation("moeprof/models/families/rules.py", "return 1 / found if", "return found if",
             "test_every_family.py -k privacy"),
    # ---- routers ----
    Mutation("moeprof/routers/logits.py", "sums[:, :-1] < self.P", "sums[:, 1:] < self.P",
             "test_router_kernels.py -k top_p"),
    Mutation("moeprof/routers/logits.py", "np.minimum(experts, tokens.z.shape[1])",
             "np.maximum(experts, 1)", "test_router_kernels.py -k entropy"),
    Mutation("moeprof/routers/functions.py", "rows[hit] <= threshold", "rows[hit] < threshold",
             "test_router_statistics.py"),
    Mutation("moeprof/routers/functions.py", "num_experts, norm=norm,", 'num_experts, norm="sum",',
             "test_routers.py -k softmax"),
    # ---- nulls ----
    Mutation("moeprof/null/tables.py", 'scores, side="left")', 'scores, side="right")',
             "test_null.py test_null_efron.py"),
    Mutation("moeprof/null/tables.py", "if ties == LARGEST:", "if ties > LARGEST:",
             "test_null.py"),
    Mutation("moeprof/null/efron.py", "if share > mass:", "if share < 0:", "test_null_efron.py"),
    Mutation("moeprof/null/efron.py", "return np.minimum.accumulate(table)", "return table",
             "test_null_efron.py"),
    Mutation("moeprof/null/resolve.py", "if len(null) > 1:", "if len(null) > 2:",
             "test_null_files.py"),
    # ---- patching ----
    Mutation("moeprof/patching/install.py", "in reversed([*zip(changes, attributes, strict=True)])",
             "in zip(changes, attributes, strict=True)", "test_patch_race.py test_patch.py"),
    Mutation("moeprof/patching/handle.py",
             "if any(vars(module)[STATE] is not state for module, state in mine):", "if False:",
             "test_patch.py test_patch_messages.py"),
    Mutation("moeprof/patching/install.py", "    wait_until_left(state)\n", "",
             "test_patch_race.py"),
    Mutation("moeprof/models/families/rules.py", "if kept is None or kept[0] != state:",
             "if kept is None:", "test_seam.py"),
    Mutation("moeprof/patching/handle.py", "lambda index, routing: callback(index, routing)",
             "callback", "test_patch.py test_patch_routers.py"),
    Mutation("moeprof/backends/tables.py",
             "if tuple(map(Tensor.data_ptr, self.matrices)) != self._addresses:", "if False:",
             "test_patch.py test_fallback.py"),
    Mutation("moeprof/backends/tables.py",
             "if not all(map(Tensor.is_contiguous, self.matrices)):", "if False:",
             "test_patch.py -k view"),
    Mutation("moeprof/patching/install.py", "if _is_ours(forward):", "if False:",
             "test_patch.py test_patch_race.py test_patch_messages.py"),
    Mutation("moeprof/patching/install.py", 'if not _is_ours(own.get("forward")):', "if False:",
             "test_patch_race.py -k hooks"),
    Mutation("moeprof/studies/sweep/advice.py", "elif static is None or missing:",
             "elif static is None:", "sweep/test_sweep_advice.py"),
    Mutation("moeprof/patching/linears.py", " or torch_is_slow(weight.dtype)", "",
             "test_linears.py -k instructions"),
    Mutation("moeprof/measure/passes.py", "norm=norm, linears=_is_slow(model))", "norm=norm)",
             "test_linears.py -k studies"),
    Mutation("moeprof/patching/patch.py", "for module, state, _ in reversed(changes):",
             "for module, state, _ in ():", "test_patch.py -k interrupted"),
    Mutation("moeprof/patching/install.py", "            for saved in state.saved:",
             "            for saved in ():", "test_patch.py -k interrupted"),
    Mutation("moeprof/models/guards.py", "if hooks or backward or", "if hooks or",
             "test_fallback.py -k backward"),
    Mutation("moeprof/patching/callables.py", "(experts == num_experts) & (weights != 0)",
             "(experts > num_experts) & (weights != 0)", "test_patch_bad_input.py -k numbered"),
    # ---- models: finder, reader, phases ----
    Mutation("moeprof/models/find.py", '"shared" not in child_name and ', "",
             "test_profiler_finding.py"),
    Mutation("moeprof/models/find.py",
             "return (module, len(members)) if len(members) >= 2 and len(classes) == 1 else None",
             "return (module, len(members)) if len(members) >= 2 else None",
             "test_profiler_finding.py"),
    Mutation("moeprof/models/reading.py",
             "inside = last.clamp(0, num_experts - 1).long()", "inside = last.long()",
             "test_parity.py test_patch_bad_input.py"),
    Mutation("moeprof/models/reading.py",
             "if last.is_floating_point() or last.dtype == torch.bool:",
             "if last.is_floating_point():", "test_patch_bad_input.py"),
    Mutation("moeprof/models/phases.py", "return DECODE if tokens == 1 else UNKNOWN",
             "return DECODE", "test_profiler_phases.py"),
    Mutation("moeprof/models/phases.py", "decodes = (past > 0) & (new == 1)",
             "decodes = new == 1", "test_profiler_phases.py"),
    # ---- the profiler's numbers ----
    Mutation("moeprof/profiler/flops.py", "return min(size, int(offsets[-1]))", "return size",
             "test_profiler_flop_counts.py test_profiler_flops.py"),
    Mutation("moeprof/models/sizes.py", "(2 if tried and wrapper.num_experts > 1 else 1)", "1",
             "test_profiler_flop_counts.py test_profiler_rows.py test_profiler_layers.py"),
    Mutation("moeprof/profile/metrics.py", "(np.arange(1, size + 1) * x).sum() - (size + 1)",
             "(np.arange(1, size + 1) * x).sum() - size", "test_profiler_metrics.py"),
    Mutation("moeprof/profile/metrics.py", "for c in counts if c.tokens]", "for c in counts]",
             "test_profiler_metrics.py test_profiler_edges.py"),
    Mutation("moeprof/profile/metrics.py", "if left_out[1].any() and rows == REAL:", "if False:",
             "test_profiler_metrics.py test_profiler_rows.py"),
    # ---- texts, losses, studies ----
    Mutation("moeprof/texts/windows.py", "decode(cut.ids[cut.first :],", "decode(cut.ids[1:],",
             "test_texts.py test_evaluate.py"),
    Mutation("moeprof/texts/windows.py", "range(0, len(ids) - 1, stride)",
             "range(0, len(ids), stride)", "test_texts.py"),
    Mutation("moeprof/measure/loss.py", "window.ids.shape[1] - 1 for", "window.ids.shape[1] for",
             "sweep/test_sweep_run.py"),
    Mutation("moeprof/measure/bootstrap.py", "[ndtr(-t), ndtr(t)]", "[0.05, 0.95]",
             "test_evaluation.py"),
    Mutation("moeprof/measure/bootstrap.py", "= counts * size / (size - 1)", "= counts",
             "test_evaluation.py -k group"),
    Mutation("moeprof/measure/bootstrap.py", "_student(freedom, np.quantile", "(np.quantile",
             "test_evaluation.py -k few"),
    Mutation("moeprof/studies/sweep/compared.py", "weights @ (bits - _bits([own])).T",
             "weights @ bits.T", "sweep/test_sweep_report.py"),
    Mutation("moeprof/studies/sweep/advice.py", 'name = f"bits_above_static_band_{end}"',
             'name = f"bits_above_static_{end}"', "sweep/test_sweep_advice.py"),
    Mutation("moeprof/studies/comparison/controls.py",
             "torch.clamp(sizes.max(1, keepdim=True).values, max=tau)", "tau",
             "test_comparison.py -k oracle"),
    Mutation("moeprof/studies/comparison/runner.py", "_ = self.reference  # of the model as it is",
             "pass", "test_resumed.py -k order"),
    Mutation("moeprof/studies/engine/steps.py", "range(calls, total)", "range(total, total)",
             "test_resumed.py -k order"),
    Mutation("moeprof/studies/diagnosis/statistics.py",
             'np.searchsorted(EDGES, p, side="left")', 'np.searchsorted(EDGES, p, side="right")',
             "test_diagnosis.py"),
    Mutation("moeprof/studies/diagnosis/statistics.py", "large[:, 1:] - large[:, :1]",
             "large[:, 1:] - 1", "test_diagnosis.py -k uniform"),
    Mutation("moeprof/studies/diagnosis/discoveries.py", "POOLED], each[..., SIZE:])",
             "POOLED], each[..., SIZE:].mean(1, keepdims=True))",
             "test_diagnosis.py -k false_of_all"),
    Mutation("moeprof/studies/diagnosis/transfer.py", "least=LEAST, draws", "draws",
             "test_diagnosis.py -k largest_distance"),
    Mutation("moeprof/studies/store/subject.py", "[described, *map(_settings, model.modules())]",
             "[described]", "test_study.py -k setting or adapter"),
    Mutation("moeprof/studies/store/subject.py", "if foreign := code_of_others(module):",
             "if foreign := None:", "test_study.py -k setting"),
    Mutation("moeprof/studies/sweep/advice.py", "return high is not None and high < 0",
             'return (row["bits_above_static"] if high is None else high) < 0',
             "test_study_report.py sweep/test_sweep_advice.py sweep/test_sweep_report.py"),
    # ---- files and the command line ----
    Mutation("moeprof/files/npz.py", " or size != member.file_size:", ":",
             "test_files.py test_null_files.py test_profiler_damage.py"),
    Mutation("moeprof/files/__init__.py", "if os.path.samestat(os.fstat(number), folder.stat()):",
             "if True:", "test_files.py test_quantized_files.py"),
    Mutation("moeprof/files/__init__.py", "os.fsync(file.fileno())", "pass",
             "sweep/test_sweep_files.py test_files.py"),
    Mutation("moeprof/cli/options.py", "torch.set_num_threads(arguments.threads)", "pass",
             "test_cli.py -k threads"),
    Mutation("moeprof/cli/streams.py", 'reconfigure(errors="replace")', "flush()",
             "test_profiler_cli.py"),
    # ---- files of quantised models ----
    Mutation("moeprof/quantizing/sources.py", "names.sort(key=_natural)", "names.sort()",
             "test_quantized_files.py -k tenth"),
    Mutation("moeprof/quantizing/mxfp4.py", "_BIAS = 127", "_BIAS = 126",
             "test_quantized_files.py -k mxfp4"),
    Mutation("moeprof/quantizing/save.py", "if version > VERSION:", "if version < VERSION:",
             "test_quantized_files.py -k newer"),
    # ---- the backend in torch ----
    Mutation("moeprof/backends/torch/experts.py", "masked_fill(is_empty, 0)", "clone()",
             "gpu/test_gpu_experts.py -k empty_slot"),
    Mutation("moeprof/backends/torch/experts.py", "return out.masked_fill(empty, 0)", "return out",
             "gpu/test_gpu_experts.py -k grouped_product_leaves"),
    Mutation("moeprof/backends/torch/experts.py", "weighted[order.argsort()]", "weighted",
             "gpu/test_gpu_experts.py -k against_float64"),
    Mutation("moeprof/backends/torch/counts.py", "tokens.reach(_one_level, t)",
             "tokens.reach(_one_level, 0.9 * t)", "gpu/test_gpu_routing.py -k fixed_p"),
    Mutation("moeprof/profiler/session.py", "            step.end()", "            pass",
             "gpu/test_gpu_models.py -k elsewhere"),
]
# fmt: on


def build() -> bool:
    """Both extensions, in place; False where the C does not compile. Faster with ccache."""
    cached = {"CC": "ccache cc"} if shutil.which("ccache") else {}
    command = "setup.py -q build_ext --inplace --build-temp build/mutations".split()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=cached | os.environ,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-2000:])
    return done.returncode == 0


def caught(mutation: Mutation) -> bool:
    """Whether the tests fail with it (or the compiler refuses it)."""
    path = ROOT / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file}: not there once: {mutation.old}"
    built = {Path(name): None for name in glob(f"{ROOT}/moeprof/*.so")}
    is_c = mutation.file.startswith("csrc/")
    if is_c:
        built = {name: shutil.copy2(name, f"{name}.kept") for name in built}
    try:
        path.write_text(text.replace(mutation.old, mutation.new))
        if is_c and not build():
            return True
        names, _, expression = mutation.tests.partition(" -k ")
        files = [f"tests/{name}" for name in names.split()]
        options = ["-k", expression] if expression else []
        command = [sys.executable, "-m", "pytest", "-x", "-q", *files, *options]
        quiet = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
        print("   ", done.stdout.strip().splitlines()[-1])
        # 1: tests failed; below 0: a signal, such as that of a fault of memory; else no tests ran
        assert done.returncode <= 1, done.stdout[-3000:]
        return done.returncode != 0
    finally:
        path.write_text(text)
        if is_c:
            for name, kept in built.items():
                os.replace(kept, name)


def main(arguments: list[str]) -> int:
    if arguments == ["--list"]:
        for number, mutation in enumerate(MUTATIONS, 1):
            print(f"{number:3} {mutation.file}: {mutation.old} -> {mutation.new}")
        return 0
    survivors = []
    for number in map(int, arguments) if arguments else range(1, len(MUTATIONS) + 1):
        mutation = MUTATIONS[number - 1]
        print(f"{number:3} {mutation.file}: {mutation.old} -> {mutation.new}", flush=True)
        if not caught(mutation):
            survivors.append(number)
            print("    SURVIVED", flush=True)
    print(f"survivors: {survivors or 'none'}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

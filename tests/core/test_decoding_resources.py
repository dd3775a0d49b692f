"""What the kernels of decoding need of a Hopper GPU, from compilation alone."""

import re

from .resources import usages, used

HEAD, WIDTH, INNER, WORDS, COLUMNS = 64, 512, 2048, 208, 1024  # the released enwik8 sizes
INTEGERS = {"p_tokens": "i64", "p_slots": "i64", "p_words": "i64", "p_position": "i64", "p_found": "i64"}
INTEGERS |= {"p_seed": "i64", "p_arrived": "i32"}
SINGLE = {
    "p_mean",
    "p_rstd",
    "p_parts",
    "p_acc",
    "p_top",
    "p_sum",
    "p_normalizers",
    "p_scores",
    "p_added",
    "p_log_probs",
    "p_found_log_probs",
}
NUMBERS = {"eps", "residual_eps", "by_temperature", "top_p", "scale"}


def dependent(few: bool) -> dict:
    """The constants of launches for few rows, and for many."""
    return {"EARLY": few, "PDL": 2 if few else 0}


def launches(dtype: str) -> dict:
    """A launch's kernel, constants and tile, by name."""
    from lamemo_fairseq.core.decoding import attention_kernel, word_kernels
    from lamemo_fairseq.core.kernels import row_kernels

    found = {}
    sinusoids = {"CONTENT": True, "POSITION": True, "TABLE": True, "SCORE": False, "NEAREST": 0}
    penalty = {"CONTENT": False, "POSITION": False, "TABLE": False, "SCORE": True, "NEAREST": 1}
    for splits, size, parts in ((1, HEAD, sinusoids), (16, HEAD, sinusoids), (1, 1024, sinusoids), (16, HEAD, penalty)):
        columns = attention_kernel.columns_at_a_time(size, 4 if dtype == "fp32" else 2)
        blocks = {"BLOCK_D": size, "BLOCK_C": columns, "STAGES": attention_kernel.STAGES}
        found[f"attention, {splits} splits, heads of {size}, score {parts['SCORE']}"] = (
            attention_kernel.cached_attention_kernel,
            {"scale": 0.125, "D": size, "S": splits, **blocks, **parts, "RECORD": True, **dependent(splits > 1)},
            {},
        )
    flags = dict.fromkeys(("NORM", "BIAS", "RELU", "RESIDUAL", "RESIDUAL_NORM"), False)
    of = {
        "qkv": (WIDTH, 3 * WIDTH, {"NORM": True}),
        "out": (WIDTH, WIDTH, {"RESIDUAL": True, "RESIDUAL_NORM": True}),
        "fc1": (WIDTH, INNER, {"NORM": True, "BIAS": True, "RELU": True}),
        "fc2": (INNER, WIDTH, {"BIAS": True, "RESIDUAL": True, "RESIDUAL_NORM": True}),
        "widest": (1024, 1024, {"NORM": True, "RESIDUAL": True, "RESIDUAL_NORM": True}),
    }
    for name, (size, width, does) in of.items():
        for rows in (1, 16, 64):
            tile = row_kernels._tile(rows, size, width, 4 if dtype == "fp32" else 2)
            options = {k: tile.pop(k) for k in ("num_warps", "num_stages") if k in tile}
            constants = {**flags, **does, "WIDE_K": size, "WIDE_N": width, **tile, **dependent(rows <= 16)}
            found[f"{name}, {rows} rows"] = (row_kernels.row_map_kernel, constants, options)
    found["embed"] = (word_kernels.embed_kernel, {"D": WIDTH, "KEEP": True, "BLOCK_D": WIDTH}, {})
    for block in (256, 512):
        constants = {"ADD": True, "TOP_K": 5, "TOP_P": True, "BLOCK_V": block, "BLOCK_W": word_kernels.PAIRS}
        constants |= dependent(True)
        found[f"draw of {block}"] = (word_kernels.draw_kernel, constants, {"num_warps": word_kernels.WARPS})
    return found


def compile_all(dtype: str) -> dict:
    """Compile every launch for sm_90; run in a process without the interpreter."""
    usage = {}
    for name, (kernel, constants, options) in launches(dtype).items():
        kinds = {n: "*" + INTEGERS.get(n, "fp32" if n in SINGLE else dtype) for n in kernel.arg_names if n[:2] == "p_"}
        kinds |= dict.fromkeys(NUMBERS, "fp32")
        free = [n for n in kernel.arg_names if n not in NUMBERS]
        divisible = [n for n in free if n.startswith(("p_", "s_")) or n in ("K", "N", "columns", "mem_len")]
        usage[name], ptx = used(kernel, constants, kinds, divisible, options)
        loads = [int(n) * int(size) // 8 for n, size in re.findall(r"ld\.global\S*\.v(\d)\.b(\d+)", ptx)]
        usage[name]["LOAD"] = max(loads, default=4)
    return usage


def test_no_spills_and_wide_loads():
    _, halves = usages(__name__, ["fp32"], ["bf16"])
    for launch, usage in halves.items():
        if "rows" in launch or "attention" in launch:  # what reads weights or the cache
            assert usage["LOAD"] == 16, (launch, usage)

"""What the kernels cost on a Hopper GPU: registers, spills and shared memory, from compilation alone."""

from .resources import usages, used

KERNELS = ("forward_kernel", "row_kernel", "key_kernel", "query_kernel")
POSITION_KERNELS = ("position_kernel", "table_kernel", "class_sum_kernel")
OTHERS = ("store_kernel", "group_kernel", "best_group_kernel", "candidate_kernel", "retrieval_kernel", "append_kernel")


def compile_all(head: int, dtype: str) -> dict:
    """Compile every kernel for sm_90 as LaMemo's look-ahead launches it; run in a process without the interpreter."""
    import torch
    import triton

    from lamemo_fairseq.core.attention.fused import kernels, position_kernels, tiles
    from lamemo_fairseq.core.memory.memorizing import kernel as memorizing
    from lamemo_fairseq.core.memory.memorizing import retrieval

    block = max(16, triton.next_power_of_2(head))
    chosen = tiles.tiles_for(head, {"fp32": torch.float32}.get(dtype, torch.bfloat16))
    tile_of = {f"{name}_kernel": tile for name, tile in chosen._asdict().items()} | {
        "store_kernel": chosen.key if dtype == "fp32" else chosen.query,
        "best_group_kernel": tiles.Tile(0, 0, 1, 2),
        "candidate_kernel": tiles.Tile(0, 0, 1, 2),
    }
    flags = dict.fromkeys(("CONTENT", "POSITION", "STORED", "TABLE"), True)
    flags |= dict.fromkeys(("FIRST", "DROPOUT", "CHUNKED", "ADD", "LEARNED", "MASKED", "BACKWARD"), False)
    owner_of = dict.fromkeys(KERNELS, kernels) | dict.fromkeys(POSITION_KERNELS, position_kernels)
    owner_of |= dict.fromkeys(OTHERS, memorizing)
    single = {
        "p_lse",
        "p_best",
        "p_stored_lse",
        "p_merged",
        "p_new",
        "p_rows",
        "p_du",
        "p_dtable",
        "p_dlearned",
        "p_copies",
    }
    blocks = {"best_group_kernel": retrieval.MAXIMA, "candidate_kernel": retrieval.CANDIDATES}
    blocks["append_kernel"] = retrieval.COPIED
    found = {}
    for name, owner in owner_of.items():
        kernel = getattr(owner, name)
        tile = tile_of.get(name, tiles.Tile(32, 32, 4, 2))
        constants = {
            "D": head,
            "BLOCK_D": block,
            "BLOCK_Q": tile.queries,
            "BLOCK_K": tile.keys,
            "BLOCK_U": 16,
            "COUNT": 32,
            "PARTS": 32,
            "BLOCK_C": 32,
            "SIZE": 8,
            "BLOCK": blocks.get(name),
            **flags,
        }
        constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
        kinds = {n: f"*{dtype}" for n in kernel.arg_names if n.startswith("p_")}
        kinds |= dict.fromkeys(single, "*fp32") | {"p_first": "*i32", "p_seed": "*i32", "p_groups": "*i32"}
        if name in ("candidate_kernel", "retrieval_kernel", "append_kernel"):
            kinds["p_rows"] = "*i32"
        kinds |= dict.fromkeys(("scale", "dropout", "eps"), "fp32")
        # Pointers and strides are multiples of 16, but for those of position scores, which count vectors of 8 elements.
        scores = {"s_pc", "s_ph", "s_pr", "s_pi", "s_pb"}
        divisible = [n for n in kernel.arg_names if n.startswith(("p_", "s_")) and n not in scores]
        options = tile.options()
        found[name], _ = used(kernel, constants, kinds, divisible, options)
    return found


def test_no_spills():
    cases = [(48, "bf16"), (64, "bf16"), (128, "bf16"), (64, "fp32")]
    assert all(found.keys() == {*KERNELS, *POSITION_KERNELS, *OTHERS} for found in usages(__name__, *cases))

"""What the kernels cost on a Hopper GPU: registers, spills and shared memory, from compilation alone."""

from .resources import usages, used

KERNELS = ("position_query_kernel", "forward_kernel", "delta_kernel", "clear_kernel", "key_kernel", "query_kernel")


def compile_all(head: int, dtype: str) -> dict:
    """Compile every kernel for sm_90 as LaMemo's look-ahead launches it; run in a process without the interpreter."""
    import torch
    import triton

    from lamemo_fairseq.core.attention.fused import kernels, tiles

    block = max(16, triton.next_power_of_2(head))
    chosen = tiles.tiles_for(head, {"fp32": torch.float32}.get(dtype, torch.bfloat16))
    tile_of = {"forward_kernel": chosen.forward, "key_kernel": chosen.key, "query_kernel": chosen.query}
    flags = dict.fromkeys(("CONTENT", "POSITION", "STORED"), True)
    flags |= dict.fromkeys(("FIRST", "DROPOUT", "CHUNKED", "ADD"), False)
    single = {"p_stored_lse", "p_merged", "p_new", "p_rows", "p_du"}
    found = {}
    for name in KERNELS:
        kernel = getattr(kernels, name)
        tile = tile_of.get(name, tiles.Tile(64 if name in ("position_query_kernel", "clear_kernel") else 32, 32, 4, 2))
        constants = {
            "D": head,
            "BLOCK_D": block,
            "BLOCK_Q": tile.queries,
            "BLOCK_K": tile.keys,
            "BLOCK_W": 64,
            **flags,
        }
        constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
        kinds = {n: f"*{dtype}" for n in kernel.arg_names if n.startswith("p_")}
        kinds |= dict.fromkeys(single, "*fp32") | {"p_first": "*i32", "p_seed": "*i32"}
        kinds |= dict.fromkeys(("scale", "dropout", "eps"), "fp32")
        # Pointers and strides are multiples of 16, but for those of position scores, which count vectors of 8 elements.
        scores = {"s_pc", "s_ph", "s_pr", "s_pb", "s_pi"}
        divisible = [n for n in kernel.arg_names if n.startswith(("p_", "s_")) and n not in scores]
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        found[name], _ = used(kernel, constants, kinds, divisible, options)
    return found


def test_no_spills():
    cases = [(48, "bf16"), (64, "bf16"), (128, "bf16"), (64, "fp32")]
    assert all(found.keys() == set(KERNELS) for found in usages(__name__, *cases))

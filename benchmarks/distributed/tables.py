"""The tables, as people read them."""

from .cases import LOGITS, MEGATRON, NO_GRADIENT, OURS, Shape


def in_words(shape: Shape) -> str:
    return f"input {shape.N} x {shape.D}, weight {shape.V} x {shape.D}"


def of_gloo(found: dict[str, list[dict]], modelled: list[dict], shards: list[dict]) -> dict[str, list[dict]]:
    """By their titles."""
    return {
        "Sent by a rank, forward and backward, KiB": of_volume(found["volume"]),
        "Comparing arguments, ms": of_agreement(found["agreement"]),
        "Forward and backward, two ranks on this machine": of_times(found["times"]),
        "A model of the head on H100s, ms": of_model(modelled),
        "FSDP2's shard of the head, MiB a rank": of_shards(shards),
    }


def of_volume(rows: list[dict]) -> list[dict]:
    theirs = {(row["p"], row["dtype"], row["what"]): row["sent_bytes"] for row in rows if row["provider"] == MEGATRON}
    table = []
    for row in rows:
        same = LOGITS if row["what"] == NO_GRADIENT else row["what"]
        mine = row["provider"] == OURS
        in_float32 = theirs.get((row["p"], "float32", same)) if mine else None
        in_same = theirs.get((row["p"], row["dtype"], same)) if mine else None
        table.append({
            "": f"{row['provider']}, {row['what']}",
            "ranks": row["p"],
            "dtype": row["dtype"],
            "kept": f"{row['kept']:.0%}" if mine else "any",
            "formula": kib(row["formula_bytes"]),
            "counted": kib(row["sent_bytes"]),
            "of them agreement": kib(row["agreement_bytes"]),
            "as gloo sends": kib(row["sent_by_gloo_bytes"]),
            "loopback": kib(row["loopback_bytes"]) if row["loopback_bytes"] != "" else "",
            "/ Megatron's": f"{row['sent_bytes'] / in_same:.2f}" if in_same else "",
            "/ Megatron's in float32": f"{row['sent_bytes'] / in_float32:.2f}" if in_float32 else "",
        })  # fmt: skip
    return table


def kib(n_bytes: float) -> str:
    return f"{n_bytes / 2**10:.1f}"


def of_agreement(rows: list[dict]) -> list[dict]:
    return [
        {
            "": row["what"],
            "ranks": row["p"],
            "a call with it": f"{row['with_ms']:.2f}",
            "without": f"{row['without_ms']:.2f}",
            "difference": f"{row['with_ms'] - row['without_ms']:.2f}",
            "alone": f"{row['agree_ms']:.2f}",
        }
        for row in rows
    ]


def of_times(rows: list[dict]) -> list[dict]:
    return [
        {
            "": f"{row['provider']}, {row['what']}",
            "ranks": row["p"],
            "kept": f"{row['kept']:.0%}",
            "median ms": f"{row['ms_p50']:.4g}",
            "p20-p80 ms": f"{row['ms_p20']:.4g} - {row['ms_p80']:.4g}",
            "time / ours": f"{row['over_ours']:.2f}",
            "time / one rank": f"{row['over_one_rank']:.2f}" if row["over_one_rank"] != "" else "",
        }
        for row in rows
    ]


def of_model(rows: list[dict]) -> list[dict]:
    return [
        {
            "rows": row["rows"],
            "kept": f"{row['kept']:.0%}",
            "GPUs": row["p"],
            "compute": f"{row['compute_ms']:.2f}",
            "communication": f"{row['communication_ms']:.2f}",
            "one after the other": f"{row['serial_ms']:.2f}",
            "overlapped": f"{row['overlapped_ms']:.2f}",
            "efficiency": f"{row['efficiency']:.1%}",
            "one after the other ": f"{row['efficiency_serial']:.1%}",
            "with one adapter": f"{row['efficiency_one_adapter']:.1%}",
        }
        for row in rows
    ]


def of_shards(rows: list[dict]) -> list[dict]:
    return [
        {
            "ranks": row["p"],
            "rows a rank": row["N"],
            "valid": f"{row['valid']:.0%}",
            "kept": f"{row['kept']:.0%}",
            "weight gathered twice": row["weight_twice"],
            "once": row["weight_once"],
            "rows travel": row["rows"],
            "/ once": row["over_weight_once"],
        }
        for row in rows
    ]

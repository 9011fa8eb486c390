"""Ways in which a head that FSDP2 has sharded would train silently wrong, as far as they can be seen."""

import warnings

from torch.utils.weak import WeakTensorKeyDictionary

_looked_at = WeakTensorKeyDictionary()


def warn_of_averages(linear_weight, linear_bias) -> None:
    """Warn, once per parameter, if FSDP2 averages the gradients of a model of which this is the head's own shard.

    Nothing public tells. Which modules are one model, FSDP2 knows from the first forward on.
    """
    from torch.distributed._composable_state import _module_state_mapping

    if linear_weight in _looked_at:
        return
    states = [state for state in (reference() for reference in _module_state_mapping.values()) if _fsdp_groups(state)]
    of_head = [
        state
        for state in states
        if any(p.sharded_param is linear_weight for group in _fsdp_groups(state) for p in group.fsdp_params)
    ]
    if of_head and of_head[0]._is_root is None:
        return
    _looked_at[linear_weight] = True
    for state in states:
        if of_head and state._state_ctx is of_head[0]._state_ctx and _averages(state, (linear_weight, linear_bias)):
            warnings.warn(
                "linear_weight is FSDP2's own shard, whose gradient is a sum over ranks, but FSDP2 averages others of "
                "this model over them, which makes those too small by a factor of their number: call "
                "set_gradient_divide_factor(1.0) on each of its FSDP modules, and with gloo "
                "set_force_sum_reduction_for_comms(True) before it",
                UserWarning,
                stacklevel=2,
            )
            return


def _fsdp_groups(state) -> list:
    """The groups of parameters that FSDP2 gathers at once; older versions have at most one per module."""
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def _averages(state, head: tuple) -> bool:
    """Whether FSDP2 divides gradients of parameters other than those of the head, which it hands on as they are."""
    for group in _fsdp_groups(state):
        if group.mesh_info.mesh.size() == 1 or getattr(group, "gradient_divide_factor", 1) == 1:
            continue
        for parameter in group.fsdp_params:
            tied = parameter._module_info.shared_modules
            is_of_head = not tied and any(parameter.sharded_param is tensor for tensor in head)
            if parameter.sharded_param.requires_grad and not is_of_head:
                return True
    return False


def warn_of_full_tensor(linear_weight) -> None:
    """Warn of a weight that `full_tensor()` gathered, without being told whose gradient it is, and maybe converted."""
    node = linear_weight.grad_fn
    while type(node).__name__ != "_ToTorchTensorBackward":
        if node is None or len(node.next_functions) != 1:
            return
        node = node.next_functions[0][0]
    gathered = node.next_functions[0][0]
    spec = getattr(gathered, "current_spec", None)
    was_sharded = spec is not None and any(placement.is_shard() for placement in spec.placements)
    if was_sharded and getattr(node, "grad_placements", None) is None:
        warnings.warn(
            "linear_weight comes from full_tensor(), which takes its gradient for the same on all ranks. Where they "
            "have rows of their own, as under FSDP2, that drops the gradient of the others: make the head a "
            "TruncatedCrossEntropyHead, or pass the shard itself with rows='sharded'",
            UserWarning,
            stacklevel=2,
        )

"""An lm-head that has the loss, and the denominator of a step, in one process; over ranks see test_distributed."""

import copy

import pytest
import torch
from cases import make_linear_inputs

import tce_kernels
from tce_kernels import linear_truncated_cross_entropy

D, V = 8, 23


def test_a_head_is_a_linear_whose_forward_has_the_loss(device):
    input, weight, bias, target = make_linear_inputs(20, D, V, torch.float32, device)
    linear = torch.nn.Linear(D, V, device=device)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    class_weight = torch.rand(V, device=device)
    head = tce_kernels.TruncatedCrossEntropyHead.from_linear(
        linear.eval(), threshold=0.4, weight=class_weight, z_loss=0.1
    )
    assert head.weight is linear.weight and head.bias is linear.bias and not head.training
    assert list(head.state_dict()) == ["weight", "bias"]
    assert torch.equal(head(input), linear(input))
    options = dict(linear_bias=linear.bias, weight=class_weight, z_loss=0.1)
    expected = linear_truncated_cross_entropy(input, linear.weight, target, 0.4, **options)
    assert torch.equal(head(input, target), expected)
    assert torch.equal(
        head(input, target, z_loss=0.0, weight=None),
        linear_truncated_cross_entropy(input, linear.weight, target, 0.4, linear_bias=linear.bias),
    )
    head.threshold = torch.tensor(0.9, device=device)  # a schedule
    assert torch.equal(
        head(input, target), linear_truncated_cross_entropy(input, linear.weight, target, 0.9, **options)
    )
    again = copy.deepcopy(head)
    assert torch.equal(again(input, target), head(input, target))
    assert "in_features" in repr(head) and "z_loss=0.1" in repr(head)


def test_what_a_head_refuses():
    with pytest.raises(TypeError, match="linear must be a torch.nn.Linear, got Embedding"):
        tce_kernels.TruncatedCrossEntropyHead.from_linear(torch.nn.Embedding(3, 4))
    with pytest.raises(TypeError, match="inplace is not an option"):
        tce_kernels.TruncatedCrossEntropyHead(3, 4, inplace=True)
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 2"):
        tce_kernels.TruncatedCrossEntropyHead(3, 4, threshold=2)
    head = tce_kernels.TruncatedCrossEntropyHead(3, 4, dtype=torch.float64)
    assert head.bias is None and head.weight.dtype == torch.float64
    with pytest.raises(TypeError, match="needs a target, got z_loss"):
        head(torch.zeros(2, 3, dtype=torch.float64), z_loss=0.1)
    with pytest.raises(ValueError, match="rows must be left at 'replicated'.* without a group"):
        head(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1, 2]), rows="sharded")


def test_the_denominator_of_a_step_in_one_process():
    """Of several batches together the gradient is that of one mean."""
    target = torch.tensor([[1, -100, 3], [2, 2, -100]], dtype=torch.int32)
    token_weight = torch.rand(2, 3)
    weight = torch.rand(5, dtype=torch.float64)
    total = tce_kernels.distributed.global_denominator
    assert total(target).item() == 4 and total(target).dtype == torch.float32
    assert total([target, target[0], target[:0]]).item() == 6
    assert total([]).item() == 0
    assert total(target, ignore_index=2).item() == 4
    expected = (weight[[1, 3, 2, 2]] * token_weight[target != -100]).sum()
    assert total([target], weight=weight, token_weights=[token_weight]).item() == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="token_weights must be as many as the targets, 2, got 1"):
        total([target, target], token_weights=[token_weight])
    with pytest.raises(TypeError, match="target must be int32 or int64, got torch.float32"):
        total(token_weight)
    with pytest.raises(TypeError, match="group must be None or a torch.distributed.ProcessGroup, got str"):
        total(target, group="dp")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_denominator_that_counts_no_tokens_is_refused(dtype):
    """Which is what FSDP2 makes of one that it is given in its mixed precision."""
    with pytest.raises(TypeError, match="which counts no tokens"):
        tce_kernels.TruncatedCrossEntropyHead(3, 4)(
            torch.zeros(2, 3), torch.tensor([1, 2]), denominator=torch.tensor(4097.0, dtype=dtype)
        )

"""truncate: the same models with another loss, the same in everything else; what is refused."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import tce_kernels
from tce_kernels.integrations.causal_lm import CausalLMLoss, restore, truncate
from tce_kernels.integrations.lazy import LazyHead, LazyLogits, Recipe

from .models import MODELS, OLD, SCALES, batch, spread
from .tiny import V, gradients, llama, mixtral, relative

ALL = pytest.mark.parametrize("kind", MODELS)
EXACT = 1e-6  # of float32, relative to the largest: what sums in another order differ by


@pytest.fixture
def made(monkeypatch):
    """The names of what has made logits."""
    compute, seen = Recipe.compute, []
    monkeypatch.setattr(Recipe, "compute", lambda recipe: seen.append(recipe) or compute(recipe))
    return seen


def pair(kind, threshold=1.0, **options):
    """A model, and a truncated copy of it with its loss."""
    stock = spread(MODELS[kind]()).eval()  # without dropout
    model = copy.deepcopy(stock)
    return stock, model, truncate(model, threshold, **options)


def target_log_prob(kind, outputs, labels):
    """log p of each label, as float64 says it, and where there is one."""
    if kind != "encoder":
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    log_prob = outputs.logits.detach().double().log_softmax(-1)
    return log_prob.gather(-1, labels.clamp(min=0)[..., None])[..., 0], labels != -100


@ALL
def test_threshold_one_is_the_stock_model_without_logits(kind, made):
    stock, model, loss = pair(kind)
    inputs = batch(stock)
    want, want_gradients = gradients(stock, inputs)
    got, got_gradients = gradients(model, inputs)
    assert got == pytest.approx(want, rel=EXACT)
    assert relative(got_gradients, want_gradients) < EXACT
    assert loss.fused and not made
    logits = model(**inputs).logits
    scale, softcap = SCALES.get(kind, (1.0, None))
    assert logits.recipe.scale == pytest.approx(scale) and logits.recipe.softcap == softcap
    assert torch.equal(logits, stock(**inputs).logits)


@ALL
def test_truncation_is_that_of_the_definition(kind, made):
    stock, model, loss = pair(kind)
    inputs = batch(stock)
    outputs = stock(**inputs)
    log_prob, valid = target_log_prob(kind, outputs, inputs["labels"])
    auxiliary = outputs.loss.detach() + (log_prob * valid).sum() / valid.sum()  # of experts
    p = log_prob[valid].exp().sort().values
    loss.threshold.fill_(p[len(p) // 2 : len(p) // 2 + 2].mean())  # between two tokens
    kept = valid & (log_prob <= loss.threshold.double().log())
    want = auxiliary - (log_prob * kept).sum() / valid.sum()
    assert model(**inputs).loss.item() == pytest.approx(want.item(), rel=1e-5)
    statistics = loss.observed["train"].since("test")
    assert statistics.n_tokens == valid.sum() and statistics.n_calls == 1
    assert statistics.truncated == pytest.approx(1 - kept.sum().item() / valid.sum().item())
    assert statistics.confidence == pytest.approx(log_prob[valid].exp().mean().item(), rel=1e-5)
    assert not made


@ALL
def test_the_number_of_items_divides(kind):
    stock, model, _ = pair(kind)
    for number in (7, torch.tensor(7), torch.tensor([7]), 7.5):
        inputs = batch(stock) | {"num_items_in_batch": number}
        if kind in ("images", "encoder"):
            inputs.pop("use_cache", None)
        want, got = stock(**inputs).loss, model(**inputs).loss
        assert got.shape == () and got.item() == pytest.approx(want.item(), rel=EXACT), number


@ALL
def test_generation_is_that_of_the_stock_model(kind):
    if OLD and kind == "experts":
        pytest.skip(f"Mixtral of transformers {transformers.__version__} fails by itself with a mask")
    stock, model, _ = pair(kind)
    tokens = batch(stock)["input_ids"][:, :6]
    for how in ({}, {"num_beams": 3}):
        how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | how
        assert torch.equal(model.generate(tokens, **how), stock.generate(tokens, **how))


def test_focal_loss():
    stock, model, _ = pair("llama", rule="focal", threshold=0.9, gamma=1.5, alpha=0.5)
    inputs = batch(stock)
    logits, labels = stock(**inputs).logits, inputs["labels"]
    want = tce_kernels.focal_cross_entropy(logits[:, :-1], labels[:, 1:], 1.5, alpha=0.5, backend="reference")
    assert model(**inputs).loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_options_reach_the_loss_and_those_of_the_linear_one_stay_there():
    stock, model, loss = pair("llama", z_loss=0.01, label_smoothing=0.1, chunk_size=5, gradient_tolerance=0.0)
    inputs = batch(stock)
    logits, labels = stock(**inputs).logits, inputs["labels"]
    options = {"z_loss": 0.01, "label_smoothing": 0.1}
    want = tce_kernels.truncated_cross_entropy(logits[:, :-1], labels[:, 1:], 1.0, backend="reference", **options)
    assert model(**inputs).loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert loss.fused
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + 0)  # makes them
    with pytest.warns(UserWarning, match="in memory, made by add"):
        assert model(**inputs).loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert not loss.fused
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        model(**inputs)


def test_eager_logits(made):
    stock, model, loss = pair("softcap", lazy_logits=False)
    inputs = batch(stock)
    want, got = gradients(stock, inputs), gradients(model, inputs)
    assert got[0] == pytest.approx(want[0], rel=EXACT) and relative(got[1], want[1]) < EXACT
    assert type(model.lm_head) is torch.nn.Linear and not loss.fused and not made


def test_nothing_to_learn_is_zero_and_finite():
    _, model, _ = pair("llama")
    inputs = batch(model)
    inputs["labels"].fill_(-100)
    loss, found = gradients(model, inputs)
    assert loss == 0 and all(not gradient.any() for gradient in found.values())


def test_a_second_truncate_changes_the_options_of_the_same_loss():
    _, model, loss = pair("llama", z_loss=0.1)
    threshold = torch.tensor(0.5)
    assert truncate(model, threshold) is loss and loss.threshold is threshold
    assert "z_loss" not in loss.options and type(model.lm_head) is LazyHead
    model(**batch(model))
    assert loss.calls == 1
    with pytest.raises(ValueError, match="threshold"):
        truncate(model, 2.0)
    assert loss.threshold is threshold  # unchanged


def test_restore():
    stock, model, _ = pair("llama")
    restore(stock)
    restore(model)
    restore(model)
    assert model.loss_function is stock.loss_function and type(model.lm_head) is torch.nn.Linear
    assert vars(model.lm_head).keys() == vars(stock.lm_head).keys()
    assert type(model(**batch(model)).logits) is torch.Tensor


def test_training_and_evaluation_are_observed_apart():
    _, model, loss = pair("llama", 0.02)
    inputs = batch(model)
    model(**inputs)
    with torch.no_grad():
        model(**inputs), model(**inputs)
    assert [loss.observed[mode].since("test").n_calls for mode in ("train", "eval")] == [1, 2]
    assert loss.observed["eval"].since("test").n_tokens == 0


def test_shift_labels_and_keyword_arguments_of_transformers():
    stock, model, loss = pair("llama")
    inputs = batch(stock)
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[..., 1:].contiguous()
    outputs = stock(**inputs)
    logits, want = outputs.logits, outputs.loss
    got = loss(logits=logits, labels=None, vocab_size=V, shift_labels=shifted, num_items_in_batch=None, of_no_use=1)
    assert got.item() == pytest.approx(want.item(), rel=EXACT)
    ignored = inputs["labels"].masked_fill(inputs["labels"] == -100, 5)
    got = loss(logits, ignored, V, ignore_index=5)
    assert got.item() == pytest.approx(stock.loss_function(logits, ignored, V, ignore_index=5).item(), rel=EXACT)


def test_bf16_autocast_and_bf16_weights():
    """Within what bfloat16 logits are rounded to, 2^-8 of logits up to 4."""
    stock, model, loss = pair("llama")
    inputs = batch(stock)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = stock(**inputs), model(**inputs)
    assert got.loss.dtype == torch.float32 and got.logits.dtype == want.logits.dtype == torch.bfloat16 and loss.fused
    assert got.loss.item() == pytest.approx(want.loss.item(), abs=4 * 2**-8)
    assert torch.equal(got.logits, want.logits)  # made outside of autocast, as inside
    stock, model = stock.bfloat16(), model.bfloat16()
    want, got = stock(**inputs), model(**inputs)
    assert got.loss.item() == pytest.approx(want.loss.item(), abs=4 * 2**-8)
    assert torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("how", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing(how):
    stock, model, loss = pair("tied")
    inputs = batch(stock)
    want = gradients(stock, inputs)
    for each in (stock, model):
        each.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model.enable_input_require_grads()
    got = gradients(model, inputs)
    assert got[0] == pytest.approx(want[0], rel=EXACT) and relative(got[1], want[1]) < EXACT and loss.fused


def test_copies_have_their_own_loss_and_weights():
    _, model, loss = pair("llama", 0.5)
    inputs = batch(model)
    want = model(**inputs).loss.item()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other(**inputs).loss.item() == pytest.approx(want, rel=EXACT)
        assert other.loss_function is other.lm_head.loss is not loss
        other.loss_function.threshold.fill_(1e-6)
        assert other(**inputs).loss.item() == 0
        torch.nn.init.zeros_(other.lm_head.weight)
        assert not other(**inputs).logits.any()
    assert model(**inputs).loss.item() == pytest.approx(want, rel=EXACT)


def test_what_is_saved_is_the_stock_model(tmp_path):
    stock, model, _ = pair("tied")
    model.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path)
    assert type(again.lm_head) is torch.nn.Linear and again.lm_head.weight is again.model.embed_tokens.weight
    assert again(**batch(again)).loss.item() == pytest.approx(stock(**batch(stock)).loss.item(), rel=EXACT)


def test_a_new_head_costs_memory_and_not_the_meaning():
    stock, model, loss = pair("llama", 0.05)
    for each in (stock, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(V + 7)
    inputs = batch(model)
    with pytest.warns(UserWarning, match="in memory"):
        got = model(**inputs)
    log_prob, valid = target_log_prob("llama", stock(**inputs), inputs["labels"])
    kept = valid & (log_prob <= loss.threshold.double().log())
    assert got.loss.item() == pytest.approx(-(log_prob * kept).sum().item() / valid.sum().item(), rel=1e-5)
    truncate(model, 0.05)
    model(**inputs)
    assert loss.fused


@pytest.mark.parametrize("whole", [True, False])
def test_compiled(whole):
    """With one compilation more, once there are sums, and none for another threshold."""
    stock, model, loss = pair("softcap")
    inputs = batch(stock)
    want = gradients(stock, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True) if whole else model
    if not whole:
        model.model.compile(backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        loss_value, found = gradients(compiled, inputs)
        found = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}
        assert loss_value == pytest.approx(want[0], rel=EXACT) and relative(found, want[1]) < EXACT
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert loss.fused is not whole  # inside a graph logits are plain
    assert loss.observed["train"].since("test").n_calls == 4
    loss.threshold.fill_(1e-6)
    assert compiled(**inputs).loss.item() == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation(context, made):
    stock, model, loss = pair("factor")
    inputs = batch(stock)
    with context():
        outputs, want = model(**inputs), stock(**inputs)
        assert outputs.loss.item() == pytest.approx(want.loss.item(), rel=EXACT)
    assert loss.fused and not made
    assert torch.equal(outputs.logits, want.logits) and len(made) == 1
    with torch.no_grad():
        model(**inputs)  # what was observed in inference mode is no trouble elsewhere
    assert loss.observed["eval"].since("test").n_calls == 2


def test_functional_transforms():
    """Gradients, those of each sentence, and directional derivatives."""
    stock = llama(tie_word_embeddings=True, attn_implementation="eager")
    model = copy.deepcopy(stock)
    loss, inputs = truncate(model, 1.0), batch(stock)

    def values(model):
        parameters = dict(model.named_parameters())

        def of_all(parameters):
            return torch.func.functional_call(model, parameters, (), inputs).loss

        def of_one(parameters, tokens, labels):
            inputs = {"input_ids": tokens[None], "labels": labels[None], "use_cache": False}
            return torch.func.functional_call(model, parameters, (), inputs).loss

        sentences = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0))
        directions = {name: parameter.detach().sin() for name, parameter in parameters.items()}
        return (
            torch.func.grad(of_all)(parameters),
            sentences(parameters, inputs["input_ids"], inputs["labels"]),
            dict(enumerate(torch.func.jvp(of_all, (parameters,), (directions,)))),
        )

    with pytest.warns(UserWarning, match="in memory"):
        for got, want in zip(values(model), values(stock), strict=True):
            assert relative(got, want) < EXACT
    assert loss.observed["train"].since("test").n_calls == 0


@pytest.mark.skipif(OLD, reason="models of transformers 4.48 fail on meta tensors by themselves")
def test_meta_tensors():
    _, model, _ = pair("llama")
    model.to("meta")
    inputs = batch(llama())
    outputs = model(input_ids=inputs["input_ids"].to("meta"), labels=inputs["labels"].to("meta"))
    assert outputs.loss.is_meta and outputs.logits.shape == (2, 12, V)


def test_saved_tensor_hooks_see_no_weight_more_than_once():
    _, model, _ = pair("llama")
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        model(**batch(model)).loss.backward()
    of_size = [tensor for tensor in seen if tensor.shape == model.lm_head.weight.shape]
    assert len(of_size) <= 1  # its gradient, which is made in forward


PEFT = pytest.mark.skipif(not transformers.utils.is_peft_available(), reason="peft is not installed")


@PEFT
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("options, is_lazy", [
    ({"target_modules": ["q_proj"]}, True),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    ({"target_modules": ["q_proj", "lm_head"]}, False),
])  # fmt: skip
def test_peft(order, options, is_lazy):
    import peft

    def wrapped(is_truncated):
        model = spread(llama())
        loss = truncate(model, 1.0) if is_truncated and order == "before" else None
        torch.manual_seed(5)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        if is_truncated and order == "after":
            loss = truncate(model, 1.0)
        return model, loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (stock, _), (model, loss) = wrapped(False), wrapped(True)
        inputs = batch(llama())
        want, got = gradients(stock, inputs), gradients(model, inputs)
        assert got[0] == pytest.approx(want[0], rel=EXACT) and relative(got[1], want[1]) < EXACT
        assert loss.fused is is_lazy
        merged = model.merge_and_unload()
        assert merged(**inputs).loss.item() == pytest.approx(want[0], rel=1e-5)
        restore(merged)
        assert type(merged(**inputs).logits) is torch.Tensor


class Other(transformers.LlamaForCausalLM):
    """Computes its loss itself."""

    def forward(self, input_ids, labels=None, **kwargs):
        return F.cross_entropy(self.lm_head(self.model(input_ids)[0]).flatten(0, 1), labels.flatten())


def with_loss(loss):
    model = llama()
    model.loss_function = loss
    return model


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 50}
    more = {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 20}
    return transformers.BartForCausalLM(transformers.BartConfig(**sizes, **more))


REFUSED = [
    (lambda: with_loss(tce_kernels.TruncatedCrossEntropyLoss(0.5)), {}, TypeError, "must not be a torch.nn.Module"),
    (lambda: with_loss(F.cross_entropy), {}, TypeError, "must be ForCausalLMLoss or ForMaskedLMLoss, got <function"),
    (lambda: Other(llama().config), {}, TypeError, "Other must compute its loss by self.loss_function"),
    (bart, {}, TypeError, "must compute its loss by self.loss_function"),
    (lambda: torch.nn.Linear(2, 3), {}, TypeError, "must be a PreTrainedModel of transformers, .* got Linear"),
    (lambda: torch.compile(llama(), backend="eager"), {}, TypeError, "got OptimizedModule: pass the model itself"),
    (llama, {"threshold": 0}, ValueError, "threshold must be in"),
    (llama, {"threshold": torch.ones(2)}, ValueError, "threshold must be a number or a 0-d tensor"),
    (llama, {"threshold": "0.9"}, TypeError, "threshold must be a number, got str"),
    (llama, {"rule": "cross-entropy"}, ValueError, "rule must be one of 'truncated', 'focal', got 'cross-entropy'"),
    (llama, {"rule": "focal", "threshold": 0.5}, ValueError, "threshold must be left out with rule='focal'"),
    (llama, {"rule": "focal", "gamma": -1}, ValueError, "gamma must be"),
    (llama, {"lazy_logits": 1}, TypeError, "lazy_logits must be True or False, got 1"),
    (llama, {"softcap": 30.0}, TypeError, "softcap must be left out"),
    (llama, {"reduction": "sum"}, TypeError, "reduction must be left out"),
    (llama, {"denominator": 3}, TypeError, "denominator must be left out"),
    (llama, {"return_stats": False}, ValueError, "return_stats must be True or 'entropy'"),
    (llama, {"chunk_size": 0}, ValueError, "chunk_size must be"),
    (llama, {"backend": "cuda"}, ValueError, "backend must be one of"),
    (llama, {"theshold": 0.5}, TypeError, "theshold"),
]


@pytest.mark.parametrize("model, options, error, text", REFUSED)
def test_refusals(model, options, error, text):
    model = model()
    with pytest.raises(error, match=text):
        truncate(model, **options)
    if isinstance(model, transformers.LlamaForCausalLM):
        assert type(model.lm_head) is torch.nn.Linear and not isinstance(model.loss_function, CausalLMLoss)


def test_a_forward_of_liger_is_refused(monkeypatch):
    def forward(self, *args, **kwargs):
        return self.loss_function

    forward.__module__ = "liger_kernel.transformers.model.llama"
    model = llama()
    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(TypeError, match="Liger's, .* fused_linear_cross_entropy=False"):
        truncate(model)


def test_a_head_of_another_kind_costs_memory_and_says_so():
    class Head(torch.nn.Linear):
        pass

    model = spread(llama()).eval()
    want = gradients(model, batch(model))
    model.lm_head.__class__ = Head
    with pytest.warns(UserWarning, match="logits will be made: the lm-head must be a torch.nn.Linear .* got Head"):
        loss = truncate(model, 1.0)
    with pytest.warns(UserWarning, match="in memory, made by the head"):
        got = gradients(model, batch(model))
    assert got[0] == pytest.approx(want[0], rel=EXACT) and relative(got[1], want[1]) < EXACT and not loss.fused


def test_a_loss_that_is_not_called_in_training_is_warned_of_once():
    _, model, _ = pair("llama")
    inputs = batch(model)
    inputs.pop("labels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(**inputs).logits.log_softmax(-1)  # evaluation
        with torch.no_grad():
            model.train()(**inputs).logits.log_softmax(-1)
        model.train()(**batch(model)).logits.log_softmax(-1)  # metrics, after the loss
    with pytest.warns(UserWarning, match="its loss has not been called.* label_smoothing_factor"):
        model(**inputs).logits.log_softmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs).logits.log_softmax(-1)


class Writing(transformers.LlamaForCausalLM):
    """A forward that looks at the logits and changes them, before it calls the loss."""

    def forward(self, input_ids, labels, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        self.top = logits.argmax(-1)
        logits[..., 3] = -20.0
        logits[:, :, 5:].mul_(0.5)
        return self.loss_function(logits, labels, self.vocab_size)


def test_a_forward_that_changes_logits():
    torch.manual_seed(0)
    stock = spread(Writing(llama().config))
    model = copy.deepcopy(stock)
    truncate(model, 1.0)
    inputs = batch(stock)
    found = []
    for each in (stock, model):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            loss = each(inputs["input_ids"], inputs["labels"])
        loss.backward()
        found.append((loss.item(), {name: parameter.grad for name, parameter in each.named_parameters()}))
    (want, want_gradients), (got, got_gradients) = found
    assert got == pytest.approx(want, rel=EXACT) and relative(got_gradients, want_gradients) < EXACT
    assert torch.equal(model.top, stock.top)
    ours = [str(warning.message) for warning in warned if "logits" in str(warning.message)]
    assert len(ours) == 1 and "in memory, made by argmax" in ours[0]  # and not that the loss was gone around


def test_experts_keep_their_auxiliary_loss():
    stock, model = mixtral().eval(), mixtral().eval()
    truncate(model, 1e-6)
    inputs = batch(stock)
    outputs, want = model(**inputs), stock(**inputs)
    assert outputs.loss.item() == pytest.approx(0.5 * want.aux_loss.item(), rel=EXACT)
    assert isinstance(outputs.logits, LazyLogits)

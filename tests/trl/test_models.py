"""Models with a value head, and references."""

import copy
import json
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from alignkit.trl.models import (
    SUPPORTED_ARCHITECTURES,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    checkpoints,
    create_reference_model,
    modeling_base,
)
from alignkit.trl.models.modeling_value_head import ValueHead
from tests.trl.conftest import GOLDEN, tiny

IDS = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 5, 6, 7]])


def small(kind, **kwargs):
    """A model of a class that `tiny` does not know, in eval mode."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes | kwargs)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MAKERS = {
    "gpt2": lambda: tiny("gpt2"),
    "llama": lambda: tiny("llama"),
    "qwen2": lambda: tiny("qwen2"),
    "gpt_neox": lambda: small("GPTNeoX", intermediate_size=32),
    "opt": lambda: small("OPT", ffn_dim=32, word_embed_proj_dim=8),
    "opt-post-norm": lambda: small("OPT", ffn_dim=32, word_embed_proj_dim=8, do_layer_norm_before=False),
}


@pytest.fixture(params=MAKERS)
def lm(request):
    return MAKERS[request.param]()


def t5(**kwargs):
    return tiny("t5", auto="AutoModelForSeq2SeqLM", **kwargs)


def lora(**kwargs):
    return LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **kwargs)


def adapted(lm, config):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft reads the old name
        return get_peft_model(lm, config)


def with_head(lm, **kwargs):
    return AutoModelForCausalLMWithValueHead.from_pretrained(lm, **kwargs)


def folder(path, **kwargs):
    """A folder with a plain GPT-2."""
    tiny("gpt2", **kwargs).save_pretrained(path)
    return str(path)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def same_state(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, x in a.state_dict().items():
        assert x.equal(b.state_dict()[key]), key


class TestForward:
    def test_values_are_a_linear_function_of_the_last_hidden_state(self, lm):
        model = with_head(lm)
        logits, loss, values = model(IDS, attention_mask=torch.ones_like(IDS))
        out = lm(IDS, output_hidden_states=True)
        assert loss is None
        torch.testing.assert_close(logits, out.logits)
        torch.testing.assert_close(values, model.v_head.summary(out.hidden_states[-1])[..., 0])
        torch.testing.assert_close(lm.get_output_embeddings()(out.hidden_states[-1]), logits)
        assert values.shape == IDS.shape

    def test_loss_of_labels(self, lm):
        torch.testing.assert_close(with_head(lm)(IDS, labels=IDS)[1], lm(IDS, labels=IDS).loss)

    def test_cache_continues(self, lm):
        model = with_head(lm)
        logits, _, values = model(IDS)
        *_, cache = model(IDS[:, :3], return_past_key_values=True)
        rest = model(IDS[:, 3:], past_key_values=cache, attention_mask=torch.ones_like(IDS))
        assert len(rest) == 3
        torch.testing.assert_close(rest[0], logits[:, 3:])
        torch.testing.assert_close(rest[2], values[:, 3:])

    def test_no_cache_is_built_unless_it_is_used(self, lm):
        seen = []
        model = with_head(lm)
        lm.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["use_cache"]), with_kwargs=True)
        model(IDS)
        model(IDS, return_past_key_values=True)
        model(IDS, use_cache=True)
        assert seen == [False, True, True]

    def test_attention_mask_hides_padding(self, lm):
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        model = with_head(lm)
        other = torch.where(mask.bool(), IDS, 11)
        for a, b in zip(model(IDS, attention_mask=mask)[::2], model(other, attention_mask=mask)[::2]):
            torch.testing.assert_close(a[mask.bool()], b[mask.bool()])

    def test_encoder_decoder(self):
        model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(t5())
        assert model.is_encoder_decoder
        answers = torch.tensor([[1, 5, 6], [1, 7, 8]])
        logits, loss, values = model(IDS, decoder_input_ids=answers)
        out = model.pretrained_model(input_ids=IDS, decoder_input_ids=answers, output_hidden_states=True)
        assert logits.shape == (2, 3, 512)
        assert loss is None
        torch.testing.assert_close(values, model.v_head.summary(out.decoder_hidden_states[-1])[..., 0])
        assert model(IDS, labels=answers)[1] > 0
        assert model.generate(IDS, decoder_input_ids=answers, max_new_tokens=2).shape == (2, 5)

    def test_bfloat16_model_keeps_a_float32_head(self):
        model = with_head(tiny("llama").bfloat16())
        logits, loss, values = model(IDS, labels=IDS)
        assert (logits.dtype, values.dtype) == (torch.float32, torch.float32)
        (loss + values.sum()).backward()
        assert model.pretrained_model.lm_head.weight.grad.dtype == torch.bfloat16
        assert model.v_head.summary.weight.grad.abs().sum() > 0

    def test_a_head_may_be_bfloat16_too(self):
        assert with_head(tiny("llama")).bfloat16()(IDS)[2].dtype == torch.bfloat16

    def test_float64_is_not_demoted(self):
        assert with_head(tiny("llama").double())(IDS)[0].dtype == torch.float64

    def test_generate_is_the_models(self, lm):
        model = with_head(lm)
        want = lm.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
        assert model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False).equal(want)

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # names that scripts have
    def test_gradient_checkpointing_is_the_models(self):
        model = with_head(tiny("gpt2"))
        model.gradient_checkpointing_enable()
        assert model.pretrained_model.transformer.h[0].gradient_checkpointing
        model.train()
        loss = model(IDS, labels=IDS)[1]
        loss.backward()
        model.gradient_checkpointing_disable()
        assert not model.pretrained_model.transformer.h[0].gradient_checkpointing


class TestHead:
    def test_attributes(self):
        model = with_head(tiny("gpt2"))
        assert isinstance(model, SUPPORTED_ARCHITECTURES)
        assert isinstance(model, PreTrainedModelWrapper)
        assert model.v_head.summary.weight.shape == (1, 16)
        assert model.v_head.summary.bias.item() != 0
        assert model.config is model.pretrained_model.config
        assert model.device == torch.device("cpu")
        assert model.prepare_inputs_for_generation == model.pretrained_model.prepare_inputs_for_generation
        for name in ("is_peft_model", "is_sequential_parallel", "is_loaded_in_8bit", "is_loaded_in_4bit"):
            assert getattr(model, name) is False
        assert "lm_head" in model.lm_head_namings
        assert set(model.supported_args) == {"summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy"}

    def test_what_neither_has_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="nonsense"):
            with_head(tiny("gpt2")).nonsense  # noqa: B018
        with pytest.raises(AttributeError):  # hooks of accelerate are looked up, and deleted, on the wrapper itself
            with_head(tiny("gpt2"))._hf_hook  # noqa: B018

    @pytest.mark.parametrize("make", [with_head, lambda lm, **kw: AutoModelForCausalLMWithValueHead(lm, **kw)])
    def test_dropout(self, make):
        assert make(tiny("gpt2")).v_head.dropout.p == 0.1
        assert make(tiny("gpt2"), summary_dropout_prob=0.5).v_head.dropout.p == 0.5
        assert make(tiny("gpt2", summary_dropout_prob=0.3), summary_dropout_prob=0.5).v_head.dropout.p == 0.3

    def test_dropout_acts_only_while_the_model_trains(self):
        model = with_head(tiny("gpt2", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), summary_dropout_prob=0.5)
        assert model(IDS)[2].equal(model(IDS)[2])
        model.train()
        assert not model(IDS)[2].equal(model(IDS)[2])

    def test_normal_initialisation(self):
        strategy = {"v_head_init_strategy": "normal", "v_head_initializer_range": 30.0}
        head = with_head(tiny("gpt2"), **strategy).v_head.summary
        assert head.bias.item() == 0
        assert 15 < head.weight.std() < 45
        assert with_head(tiny("gpt2"), v_head_init_strategy="normal").v_head.summary.weight.std() < 0.4
        with pytest.raises(ValueError, match="v_head_init_strategy='uniform' must be None or 'normal'"):
            with_head(tiny("gpt2"), v_head_init_strategy="uniform")

    @pytest.mark.parametrize(
        ("config", "width"),
        [
            (SimpleNamespace(hidden_size=4), 4),
            (SimpleNamespace(hidden_size=4, word_embed_proj_dim=3), 3),
            (SimpleNamespace(is_encoder_decoder=True, decoder=SimpleNamespace(hidden_size=5)), 5),
            (SimpleNamespace(text_config=SimpleNamespace(hidden_size=6)), 6),
        ],
    )
    def test_width_is_the_decoders(self, config, width):
        assert ValueHead(config).summary.in_features == width

    def test_a_model_without_a_language_model_head_is_refused(self):
        for model, kind in (
            (tiny("gpt2"), AutoModelForCausalLMWithValueHead),
            (t5(), AutoModelForSeq2SeqLMWithValueHead),
        ):
            body = transformers.AutoModel.from_config(model.config)
            with pytest.raises(ValueError, match="does not have a language model head"):
                kind.from_pretrained(body)

    def test_unknown_arguments_are_refused(self):
        with pytest.raises(TypeError, match="dropout"):
            AutoModelForCausalLMWithValueHead(tiny("gpt2"), dropout=0.1)
        with pytest.warns(UserWarning, match=r"\['dtype'\] have no effect on a model that is loaded already"):
            with_head(tiny("gpt2"), dtype="float32")
        with pytest.raises(ValueError, match="pretrained_model_name_or_path must be a string or a PreTrainedModel"):
            with_head(nn.Linear(2, 2))


class TestFolders:
    def test_the_head_of_a_checkpoint_is_restored(self):
        path = GOLDEN / "tiny_gpt2"
        saved = load_file(path / "model.safetensors")
        for name in (path, str(path)):
            model = with_head(name)
            assert model.v_head.summary.weight.equal(saved["v_head.summary.weight"])
            assert model.v_head.summary.bias.equal(saved["v_head.summary.bias"])
            assert not model.training
            assert not model.v_head.training

    @pytest.mark.parametrize("shard", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
    @pytest.mark.parametrize("kind", ["causal", "seq2seq"])
    def test_round_trip(self, tmp_path, kind, shard):
        auto, lm = {
            "causal": (AutoModelForCausalLMWithValueHead, tiny("gpt2")),
            "seq2seq": (AutoModelForSeq2SeqLMWithValueHead, t5()),
        }[kind]
        model = auto.from_pretrained(lm)
        model.save_pretrained(tmp_path, **shard)
        assert (tmp_path / "model.safetensors.index.json").exists() == bool(shard)
        same_state(auto.from_pretrained(str(tmp_path)), model)
        plain = auto.transformers_parent_class.from_pretrained(tmp_path)
        same_state(plain, lm)

    def test_pickled_checkpoints(self, tmp_path):
        model = with_head(tiny("gpt2"))
        model.config.save_pretrained(tmp_path)
        state = {key: x.clone() for key, x in model.state_dict().items()}
        torch.save(state, tmp_path / "pytorch_model.bin")
        same_state(with_head(str(tmp_path)), model)
        head, rest = ({k: x for k, x in state.items() if k.startswith("v_head") == own} for own in (True, False))
        torch.save(rest, tmp_path / "one.bin")
        torch.save(head, tmp_path / "two.bin")
        places = dict.fromkeys(rest, "one.bin") | dict.fromkeys(head, "two.bin")
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (tmp_path / "pytorch_model.bin").unlink()
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        same_state(with_head(str(tmp_path)), model)

    def test_a_checkpoint_cannot_run_code(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return print, ("executed",)

        folder(tmp_path, tie_word_embeddings=True)
        weights = tmp_path / "pytorch_model.bin"
        torch.save({"v_head.summary.weight": Payload()}, weights)
        with pytest.raises(pickle.UnpicklingError):
            checkpoints.saved_head(str(tmp_path), ["pytorch_model.bin"])

    def test_without_a_head_it_is_new(self, tmp_path):
        path = folder(tmp_path)
        a, b = with_head(path), with_head(path)
        assert not a.v_head.summary.weight.equal(b.v_head.summary.weight)
        assert a.pretrained_model.lm_head.weight.equal(b.pretrained_model.lm_head.weight)

    def test_half_a_head_is_refused(self, tmp_path):
        path = folder(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        save_file(weights | {"v_head.summary.bias": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(RuntimeError, match=r"summary\.weight"):
            with_head(path)

    def test_dtype(self, tmp_path):
        tiny("gpt2").bfloat16().save_pretrained(tmp_path)
        assert with_head(str(tmp_path)).dtype == torch.float32
        for kwargs in ({"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": "auto"}):
            model = with_head(str(tmp_path), **kwargs)
            assert model.pretrained_model.lm_head.weight.dtype == torch.bfloat16
            assert model.v_head.summary.weight.dtype == torch.float32
            assert model(IDS)[0].dtype == torch.float32

    def test_state_dict_of_a_wrapped_model(self):
        model = with_head(tiny("gpt2"))
        own = model.state_dict()
        assert own.keys() == tiny("gpt2").state_dict().keys() | {"v_head.summary.weight", "v_head.summary.bias"}
        assert nn.ModuleDict({"module": model}).state_dict().keys() == {f"module.{key}" for key in own}

    def test_an_object_that_carries_a_head(self):
        head = ValueHead(tiny("gpt2").config)
        lm = tiny("gpt2")
        lm.v_head = head
        assert with_head(lm).v_head.summary.weight.equal(head.summary.weight)

    def test_push_to_hub_uploads_the_head(self, monkeypatch, tmp_path):
        hub, uploaded = transformers.utils.hub, {}
        api = SimpleNamespace(create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
        card = SimpleNamespace(save=lambda path: None)
        monkeypatch.setattr(hub, "hf_api", lambda: api, raising=False)
        monkeypatch.setattr(hub, "create_repo", api.create_repo, raising=False)
        monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card, raising=False)
        monkeypatch.setattr(
            PreTrainedModelWrapper,
            "_upload_modified_files",
            lambda self, path, repo_id, **kwargs: uploaded.update({repo_id: load_file(f"{path}/model.safetensors")}),
        )
        model = with_head(tiny("gpt2"))
        names = {name for name, _ in model.pretrained_model.named_modules()}
        model.push_to_hub("someone/something")
        assert uploaded["someone/something"]["v_head.summary.weight"].equal(model.v_head.summary.weight)
        assert {name for name, _ in model.pretrained_model.named_modules()} == names

    def test_quantised_loading(self, monkeypatch):
        calls = []

        def from_pretrained(name, *args, **kwargs):
            calls.append(kwargs)
            return tiny("gpt2")

        auto = SimpleNamespace(from_pretrained=from_pretrained)
        with pytest.warns(UserWarning, match="device_map is not given"):
            checkpoints.load(auto, "tests/golden", False, load_in_8bit=True)
        checkpoints.load(auto, "tests/golden", False, load_in_4bit=True, device_map="auto", torch_dtype=torch.float16)
        assert calls[0]["quantization_config"].load_in_8bit
        assert calls[0]["device_map"] == {"": torch.device("cpu")}
        assert calls[1]["quantization_config"].load_in_4bit
        assert (calls[1]["device_map"], calls[1]["dtype"]) == ("auto", torch.float16)
        assert all("load_in_8bit" not in kwargs and "load_in_4bit" not in kwargs for kwargs in calls)

    def test_a_quantised_model_is_prepared_for_an_adapter(self, monkeypatch):
        calls = []

        def prepare(lm, **kwargs):
            calls.append(kwargs)
            return lm

        monkeypatch.setattr(checkpoints, "prepare_model_for_kbit_training", prepare)
        lm = tiny("gpt2")
        lm.is_loaded_in_8bit = True
        model = with_head(lm, peft_config=lora(), use_gradient_checkpointing=False)
        assert calls == [{"use_gradient_checkpointing": False}]
        assert model.is_loaded_in_8bit


class TestDevices:
    @pytest.mark.parametrize(
        "places", [{"a": 0, "b": "cpu"}, {"a": 0, "b": "disk"}, {"a": "cuda:0", "b": torch.device("cpu")}]
    )
    def test_offloading_is_refused(self, places):
        lm = tiny("gpt2")
        lm.hf_device_map = places
        with pytest.raises(ValueError, match="CPU & disk offloading is not supported for ValueHead models"):
            with_head(lm)

    def test_offloading_to_disk_is_refused_by_name(self, tmp_path):
        tiny("llama").save_pretrained(tmp_path / "model")
        places = {"model": "disk", "lm_head": "cpu"}
        with pytest.raises(ValueError, match="offloaded on CPU or disk"):
            with_head(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")

    @pytest.mark.parametrize("places", ["cpu", "auto", {"": "cpu"}])
    def test_all_on_one_device(self, tmp_path, places):
        path = folder(tmp_path)
        torch.testing.assert_close(with_head(path, device_map=places)(IDS)[0], with_head(path)(IDS)[0])

    def test_several_accelerators(self):
        lm = tiny("gpt2")
        lm.hf_device_map = {"a": 0, "b": 1}
        model = with_head(lm)
        assert model.is_sequential_parallel
        assert model.hf_device_map == lm.hf_device_map


class TestAdapter:
    def test_only_the_adapter_and_the_head_train(self, tmp_path):
        path = folder(tmp_path)
        by_object = with_head(adapted(tiny("gpt2"), lora()))
        for model in (by_object, with_head(path, peft_config=lora()), with_head(tiny("gpt2"), peft_config=lora())):
            assert model.is_peft_model
            assert trainable(model) == trainable(by_object)
            assert all("lora_" in name or name.startswith("v_head.") for name in trainable(model))
            assert {"v_head.summary.weight", "v_head.summary.bias"} < trainable(model)

    def test_gradient_reaches_adapter_and_head(self):
        model = with_head(tiny("llama"), peft_config=lora())
        _, loss, values = model(IDS, labels=IDS)
        (loss + values.sum()).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in trainable(model)), name

    def test_round_trip(self, tmp_path):
        path = folder(tmp_path / "base")
        model = with_head(path, peft_config=lora())
        model.save_pretrained(tmp_path / "saved")
        state = torch.load(tmp_path / "saved/pytorch_model.bin", weights_only=True)
        assert state.keys() == {"v_head.summary.weight", "v_head.summary.bias"} == model.state_dict().keys()
        assert (tmp_path / "saved/adapter_model.safetensors").exists()
        assert (tmp_path / "saved/adapter_config.json").exists()
        loaded = with_head(str(tmp_path / "saved"))
        for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
            assert a.equal(b), name
        assert trainable(loaded) == {"v_head.summary.weight", "v_head.summary.bias"}
        assert trainable(with_head(str(tmp_path / "saved"), is_trainable=True)) == trainable(model)

    def test_an_adapter_saved_by_peft_gets_a_new_head(self, tmp_path):
        path = folder(tmp_path / "base")
        model = with_head(path, peft_config=lora())
        model.pretrained_model.save_pretrained(tmp_path / "saved")
        loaded = with_head(str(tmp_path / "saved"))
        torch.testing.assert_close(loaded(IDS)[0], model(IDS)[0])
        assert not loaded.v_head.summary.weight.equal(model.v_head.summary.weight)
        with pytest.warns(UserWarning, match="peft_config is ignored"):
            with_head(str(tmp_path / "saved"), peft_config=lora())

    def test_only_the_main_process_writes_the_head(self, tmp_path):
        with_head(tiny("gpt2"), peft_config=lora()).save_pretrained(tmp_path, is_main_process=False)
        assert not (tmp_path / "pytorch_model.bin").exists()

    def test_a_given_state_dict_is_saved(self, tmp_path):
        model = with_head(tiny("gpt2"), peft_config=lora())
        state = {key: torch.zeros_like(x) for key, x in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=state)
        assert not any(x.any() for x in torch.load(tmp_path / "pytorch_model.bin", weights_only=True).values())

    def test_adapter_of_a_bfloat16_model_stays_float32(self, tmp_path):
        path = folder(tmp_path / "base")
        model = with_head(path, peft_config=lora(), torch_dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "saved")
        loaded = with_head(str(tmp_path / "saved"), torch_dtype=torch.bfloat16, is_trainable=True)
        for each in (model, loaded):
            assert each.pretrained_model.dtype == torch.bfloat16
            assert {each.get_parameter(name).dtype for name in trainable(each)} == {torch.float32}

    def test_without_the_adapter_it_is_the_base(self):
        lm = tiny("gpt2")
        want = lm(IDS).logits
        model = with_head(lm, peft_config=lora())
        assert not torch.allclose(model(IDS)[0], want)
        with model.pretrained_model.disable_adapter():
            torch.testing.assert_close(model(IDS)[0], want)

    def test_generate(self):
        model = with_head(tiny("gpt2"), peft_config=lora())
        assert model.generate(input_ids=IDS, max_new_tokens=2, min_new_tokens=2).shape == (2, 7)

    def test_bad_configs(self):
        with pytest.raises(ValueError, match=r"peft_config must be a peft\.PeftConfig, but is a dict"):
            with_head(tiny("gpt2"), peft_config={"r": 2})
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match="PromptLearningConfig is not supported"):
            with_head(tiny("gpt2"), peft_config=prompt)


class TestRewardAdapter:
    @pytest.fixture
    def reward_model(self, tmp_path):
        """A reward model with an adapter on the body that the policies here have, and its folder."""
        model = tiny("gpt2", auto="AutoModelForSequenceClassification", num_labels=1, pad_token_id=1)
        config = LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
        model = adapted(model, config).eval()
        model.save_pretrained(tmp_path / "reward")
        return model, str(tmp_path / "reward")

    def policy(self, path, **kwargs):
        return with_head(tiny("gpt2"), peft_config=lora(), reward_adapter=path, **kwargs)

    def test_scores_are_the_reward_models(self, reward_model):
        model, path = reward_model
        policy = self.policy(path)
        before, modes = policy(IDS)[0], {name: module.training for name, module in policy.named_modules()}
        scores = policy.compute_reward_score(IDS, attention_mask=torch.ones_like(IDS))
        assert scores.shape == (2, 5, 1)
        assert not scores.requires_grad
        torch.testing.assert_close(scores[:, -1], model(IDS).logits)
        assert policy(IDS)[0].equal(before)
        assert policy.pretrained_model.active_adapter == "default"
        assert {name: module.training for name, module in policy.named_modules()} == modes

    def test_scoring_ignores_dropout_and_leaves_the_mode(self, reward_model):
        model, path = reward_model
        policy = self.policy(path).train()
        torch.testing.assert_close(policy.compute_reward_score(IDS)[:, -1], model(IDS).logits)
        assert policy.pretrained_model.training

    @pytest.mark.parametrize("is_trainable", [True, False])
    def test_what_trains_stays_what_trains(self, reward_model, tmp_path, is_trainable):
        base = folder(tmp_path / "base")
        with_head(base, peft_config=lora()).save_pretrained(tmp_path / "saved")
        name = str(tmp_path / "saved")
        policy = with_head(name, is_trainable=is_trainable, reward_adapter=reward_model[1])
        before = trainable(policy)
        assert before == trainable(with_head(name, is_trainable=is_trainable))
        policy.compute_reward_score(IDS)
        assert trainable(policy) == before
        assert not any("reward" in key or key.startswith("score") for key in policy.state_dict())

    def test_the_policys_adapter_is_active_again_after_an_error(self, reward_model):
        policy = self.policy(reward_model[1], reward_adapter_name="scorer")
        assert policy.rm_adapter_name == "scorer"
        with pytest.raises(IndexError):
            policy.compute_reward_score(torch.tensor([[100_000]]))
        assert policy.pretrained_model.active_adapter == "default"

    def test_refusals(self, reward_model, tmp_path):
        with pytest.raises(ValueError, match="reward_adapter can only be used with a PeftModel"):
            with_head(tiny("gpt2"), reward_adapter=reward_model[1])
        with pytest.raises(ValueError, match="reward_adapter must be the name of a folder or a hub id, but is 3"):
            with_head(tiny("gpt2"), peft_config=lora(), reward_adapter=3)
        adapted(tiny("gpt2"), lora()).save_pretrained(tmp_path / "plain")
        with pytest.raises(ValueError, match="has no head of the name score"):
            self.policy(str(tmp_path / "plain"))
        with pytest.raises(ValueError, match="does not support reward modeling adapter"):
            with_head(tiny("gpt2")).compute_reward_score(IDS)


def step(model):
    """One step on everything that trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    _, loss, values = model(IDS, labels=IDS)
    (loss + values.sum()).backward()
    optimizer.step()


class TestReference:
    def test_it_is_frozen_equal_and_in_eval_mode(self, lm):
        model = with_head(lm).train()
        names = trainable(model)
        reference = create_reference_model(model)
        assert not trainable(reference)
        assert trainable(model) == names
        assert not any(module.training for module in reference.modules())
        assert model.training
        same_state(reference, model)

    def test_nothing_is_shared_without_a_number(self):
        model = with_head(tiny("gpt2"))
        reference = create_reference_model(model)
        before = copy.deepcopy(reference.state_dict())
        step(model)
        assert all(x.equal(before[key]) for key, x in reference.state_dict().items())
        assert not any(
            model.get_parameter(name).equal(x) for name, x in reference.named_parameters() if "weight" in name
        )

    @pytest.mark.parametrize("layers", [0, 1])
    def test_shared_layers_are_the_same_tensors_frozen(self, lm, layers):
        model = with_head(lm)
        reference = create_reference_model(model, num_shared_layers=layers)
        before = {name: x.clone() for name, x in reference.named_parameters()}
        step(model)
        shared = {name for name, x in model.named_parameters() if x is reference.get_parameter(name)}
        storages = {x.data_ptr() for x in reference.parameters()}
        assert shared == {name for name, x in model.named_parameters() if x.data_ptr() in storages}
        assert shared == set(before) - trainable(model)
        assert not any(f".{layers}." in name for name in shared)
        assert any("embed" in name or "wte" in name for name in shared)
        assert any(".0." in name for name in shared) == (layers == 1)
        for name, x in reference.named_parameters():
            assert x.equal(before[name])
            assert not x.requires_grad
            if name in trainable(model) and "weight" in name:
                assert not model.get_parameter(name).equal(x), name

    def test_which_of_a_gpt2_are_frozen(self):
        model = with_head(tiny("gpt2"))
        create_reference_model(model, num_shared_layers=1)
        flags = {
            "pretrained_model.transformer.wte.weight": False,
            "pretrained_model.transformer.wpe.weight": False,
            "pretrained_model.transformer.h.0.attn.c_attn.weight": False,
            "pretrained_model.transformer.h.1.attn.c_attn.weight": True,
            "pretrained_model.transformer.ln_f.weight": True,
            "v_head.summary.weight": True,
        }
        assert {name: model.get_parameter(name).requires_grad for name in flags} == flags

    def test_moving_the_policy_keeps_the_sharing(self):
        model = with_head(tiny("gpt2"))
        reference = create_reference_model(model, num_shared_layers=1)
        model.bfloat16()
        assert reference.pretrained_model.transformer.wte.weight is model.pretrained_model.transformer.wte.weight

    def test_of_a_plain_model(self):
        lm = tiny("llama")
        reference = create_reference_model(lm, num_shared_layers=1)
        assert type(reference) is type(lm)
        assert reference.model.embed_tokens.weight is lm.model.embed_tokens.weight
        assert reference.lm_head.weight is not lm.lm_head.weight

    def test_a_pattern_of_ones_own(self):
        model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(t5())
        reference = create_reference_model(model, num_shared_layers=1, pattern="decoder.block.{layer}")
        base, other = model.pretrained_model, reference.pretrained_model
        assert (
            other.encoder.block[1].layer[0].SelfAttention.q.weight
            is base.encoder.block[1].layer[0].SelfAttention.q.weight
        )
        assert other.decoder.block[1].layer[0].SelfAttention.q.weight.requires_grad is False
        assert base.decoder.block[1].layer[0].SelfAttention.q.weight.requires_grad is True

    def test_no_such_layer(self):
        model = with_head(tiny("gpt2"))
        for kwargs in ({"num_shared_layers": 2}, {"num_shared_layers": 1, "pattern": "h.{layer}.typo"}):
            with pytest.raises(ValueError, match="Layer pattern could not be matched"):
                create_reference_model(model, **kwargs)
        assert all(x.requires_grad for x in model.parameters())

    def test_zero_3_is_refused(self, monkeypatch):
        monkeypatch.setattr(modeling_base, "is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(ValueError, match="ZeRO-3"):
            create_reference_model(tiny("gpt2"))

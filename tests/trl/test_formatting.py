"""Chat formats, and text out of conversations and instructions."""

import pytest
import torch
import transformers
from datasets import Dataset, Features, LargeList, Value

from alignkit.trl.extras.dataset_formatting import (
    conversations_formatting_function,
    get_formatting_func_from_dataset,
    instructions_formatting_function,
)
from alignkit.trl.models import AutoModelForCausalLMWithValueHead, setup_chat_format
from alignkit.trl.models.utils import FORMAT_MAPPING, ChatMlSpecialTokens
from tests.trl.conftest import GOLDEN, golden, tiny

MESSAGES = [
    {"role": "system", "content": "You are helpful"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi, how can I help you?"},
]
CHATML = (
    "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi, how can I help you?<|im_end|>\n"
)


@pytest.fixture
def chatty(tokenizer):
    """A tokenizer with the template of ChatML."""
    tokenizer.chat_template = ChatMlSpecialTokens().chat_template
    return tokenizer


def test_golden():
    (case,) = golden("chatml")["cases"]
    chat = ChatMlSpecialTokens()
    assert (chat.bos_token, chat.eos_token, chat.pad_token) == (case["bos"], case["eos"], case["pad"])
    assert chat.chat_template == case["chat_template"]
    assert FORMAT_MAPPING["chatml"] is ChatMlSpecialTokens
    roles = (chat.system, chat.user, chat.assistant)
    assert roles == ("<|im_start|>system", "<|im_start|>user", "<|im_start|>assistant")


class TestSetup:
    @pytest.fixture
    def tokenizer(self):
        """64 words, none of them ChatML's."""
        return transformers.AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")

    @pytest.mark.parametrize(("multiple", "rows"), [(None, 66), (64, 128)])
    @pytest.mark.parametrize("shape", ["gpt2", "llama"])
    def test_tokens_template_and_embeddings(self, tokenizer, shape, multiple, rows):
        model, words = tiny(shape, vocab_size=64), len(tokenizer)
        old = model.get_input_embeddings().weight[:words].clone()
        out = setup_chat_format(model, tokenizer, format="chatml", resize_to_multiple_of=multiple)
        assert out == (model, tokenizer)
        tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
        assert tokens == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
        assert len(tokenizer) == words + 2
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (words, words + 1)
        assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == rows
        assert model.get_input_embeddings().weight[:words].equal(old)
        assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == CHATML
        prompt = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("<|im_start|>assistant\n")
        assert tokenizer.encode("<|im_start|>user<|im_end|>").count(tokenizer.eos_token_id) == 1

    def test_configs_have_the_ids(self, tokenizer):
        model, tokenizer = setup_chat_format(tiny("gpt2", vocab_size=64), tokenizer)
        for config in (model.config, model.generation_config):
            assert config.bos_token_id == tokenizer.bos_token_id
            assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id
        with torch.no_grad():  # what it generates ends with the token of the format
            model.lm_head.weight[:] = 0
            model.lm_head.weight[tokenizer.eos_token_id] = model.transformer.ln_f.bias[:] = 1
        ids = torch.tensor([tokenizer.encode("a")])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert out[0, ids.shape[1] :].tolist() == [tokenizer.eos_token_id]

    def test_a_model_with_a_value_head(self, tokenizer):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny("gpt2", vocab_size=64))
        setup_chat_format(model, tokenizer)
        assert model(torch.tensor([[tokenizer.eos_token_id]]))[0].shape == (1, 1, 66)

    def test_twice_is_once(self, tokenizer):
        model, _ = setup_chat_format(tiny("gpt2", vocab_size=64), tokenizer)
        setup_chat_format(model, tokenizer)
        assert len(tokenizer) == model.config.vocab_size == 66

    def test_special_tokens_are_skipped(self, tokenizer):
        setup_chat_format(tiny("gpt2", vocab_size=64), tokenizer)
        ids = tokenizer.encode("<|im_start|>a<|im_end|>", add_special_tokens=False)
        assert "<|im_" in tokenizer.decode(ids)
        assert "<|im_" not in tokenizer.decode(ids, skip_special_tokens=True)

    def test_unknown_format(self, tokenizer):
        with pytest.raises(ValueError, match=r"format='alpaca' is not available; use one of \['chatml'\]"):
            setup_chat_format(tiny("gpt2", vocab_size=64), tokenizer, format="alpaca")


class TestDetection:
    @pytest.mark.parametrize("field", ["messages", "conversations"])
    def test_conversations(self, chatty, field):
        dataset = Dataset.from_dict({field: [MESSAGES, MESSAGES[1:]], "id": [1, 2]})
        func = get_formatting_func_from_dataset(dataset, chatty)
        assert func(dataset[0]) == CHATML
        assert func(dataset[0:1]) == [CHATML]
        assert func(dataset[:]) == [CHATML, CHATML[CHATML.index("\n<|im_start|>user") + 1 :]]

    def test_instructions(self, chatty):
        rows = [{"prompt": "What is 2+2?", "completion": "4"}, {"prompt": "What is 3+3?", "completion": "6"}]
        dataset = Dataset.from_list(rows)
        func = get_formatting_func_from_dataset(dataset, chatty)
        first = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        assert func(dataset[0]) == first
        assert func(dataset[0:1]) == [first]
        assert func(dataset[:])[1] == first.replace("2", "3").replace("4", "6")
        assert func(dataset[:0]) == []

    def test_another_template(self, tokenizer):
        tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
        func = conversations_formatting_function(tokenizer, "messages")
        assert (
            func({"messages": MESSAGES}) == "[system] You are helpful [user] Hello [assistant] Hi, how can I help you? "
        )
        func = instructions_formatting_function(tokenizer)
        assert func({"prompt": "a", "completion": "b"}) == "[user] a [assistant] b "

    def test_messages_come_before_conversations(self, chatty):
        other = Dataset.from_dict({"messages": ["text"], "conversations": [MESSAGES]})
        assert get_formatting_func_from_dataset(other, chatty)(other[0]) == CHATML
        both = Dataset.from_dict({"conversations": [MESSAGES[:1]], "messages": [MESSAGES]})
        assert get_formatting_func_from_dataset(both, chatty)(both[0]) == CHATML

    def test_large_strings_and_lists(self, chatty):
        text = Value("large_string")
        features = Features({"messages": LargeList({"content": text, "role": text})})
        dataset = Dataset.from_dict({"messages": [MESSAGES]}, features=features)
        assert get_formatting_func_from_dataset(dataset, chatty)(dataset[0]) == CHATML

    @pytest.mark.parametrize(
        "columns",
        [
            {"text": ["test"]},
            {"messages": [[{"from": "human", "value": "a"}]]},
            {"messages": [[{"role": "user", "content": "a", "name": "b"}]]},
            {"messages": [[{"role": "user", "content": 1}]]},
            {"messages": [["a"]]},
            {"prompt": ["a"], "completion": ["b"], "id": [1]},
            {"prompt": ["a"], "completion": [1]},
            {"prompt": ["a"]},
        ],
    )
    def test_anything_else_is_none(self, chatty, columns):
        assert get_formatting_func_from_dataset(Dataset.from_dict(columns), chatty) is None

    def test_no_dataset_of_columns(self, chatty):
        assert get_formatting_func_from_dataset([MESSAGES], chatty) is None
        assert get_formatting_func_from_dataset(torch.utils.data.TensorDataset(torch.ones(1)), chatty) is None
        assert isinstance(chatty, transformers.PreTrainedTokenizerBase)

    def test_as_many_completions_as_prompts(self, chatty):
        with pytest.raises(ValueError, match="zip"):
            instructions_formatting_function(chatty)({"prompt": ["a", "b"], "completion": ["c"]})

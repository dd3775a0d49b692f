"""Models in transformers: against the core's pass over whole segments, and through its own commands."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", minversion="5.24")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils  # noqa: E402
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, TOKENIZER_MAPPING  # noqa: E402

from lamemo_fairseq.convert_checkpoint import main  # noqa: E402
from lamemo_fairseq.core import MEMORIES, LanguageModel, TextEncoding, Tokenizer  # noqa: E402
from lamemo_fairseq.core.memory.recurrent import RecurrentMemory  # noqa: E402
from lamemo_fairseq.core.text.coders import BYTE_SYMBOLS  # noqa: E402
from lamemo_fairseq.huggingface import LamemoCache, LamemoConfig, LamemoForCausalLM, LamemoTokenizer  # noqa: E402
from lamemo_fairseq.huggingface.folder import export_folder  # noqa: E402

from ..gpus import DEVICE  # noqa: E402
from .helpers import first_of_each_memory, tiny_decoder  # noqa: E402
from .transformers_cases import LENGTHS, close, expected, padded, texts, tiny_model  # noqa: E402

FIRST = first_of_each_memory()
ADAPTIVE = {"adaptive_softmax_cutoff": "6,11", "adaptive_softmax_factor": 2.0, "adaptive_input": True}


@pytest.fixture
def model() -> LamemoForCausalLM:
    return tiny_model()


@pytest.mark.parametrize("memory", MEMORIES.names())
def test_padded_texts_in_pieces_equal_the_pass_over_segments(memory):
    model = LamemoForCausalLM.of(tiny_decoder(FIRST[memory]))
    for side in ("left", "right"):
        batch = padded(texts(), side)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        cache, logits = LamemoCache(model), []
        for start, end in ((0, 1), (1, 2), (2, 9), (9, 11)):
            logits.append(model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache).logits)
        assert cache.get_seq_length() == 11
        for logs, real, text in zip(torch.cat(logits, 1).log_softmax(-1), mask.bool(), texts(), strict=True):
            close(logs[real], expected(model, text))
    whole = model(**batch)  # with gradients, segment by segment
    assert whole.logits.requires_grad and whole.cache is None
    close(whole.logits[mask.bool()], torch.cat(logits, 1)[mask.bool()])


@pytest.mark.parametrize("memory", MEMORIES.names())
def test_generated_words_and_their_scores_are_the_cores(memory):
    core = tiny_decoder(FIRST[memory])
    found = LamemoForCausalLM.of(core).generate(
        **padded(texts()), max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True, output_logits=True
    )
    words, log_probs = core.generate(texts(), 8, temperature=0)
    assert torch.equal(found.sequences[:, 11:], words)
    logits = torch.stack(found.logits, dim=1).log_softmax(-1)
    torch.testing.assert_close(logits.amax(-1), log_probs.float(), rtol=0, atol=1e-5)


def best_texts(model, text, beams, count):
    """The texts of a beam search without a cache, and the sum of their log-probabilities."""
    running = [(0.0, text)]
    for _ in range(count):
        longer = [
            (score + float(log_prob), torch.cat([text, torch.tensor([word])]))
            for score, text in running
            for word, log_prob in enumerate(expected(model, text)[-1])
        ]
        running = sorted(longer, key=lambda pair: -pair[0])[:beams]
    return running


@pytest.mark.parametrize("memory", MEMORIES.names())
def test_beams_of_unequal_prompts_take_their_memories_along(memory):
    model = LamemoForCausalLM.of(tiny_decoder(FIRST[memory], segment_length=2))
    prompts = texts([5, 2])
    found = model.generate(
        **padded(prompts), max_new_tokens=4, num_beams=3, num_return_sequences=3, length_penalty=0.0,
        eos_token_id=None, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    wanted = [pair for prompt in prompts for pair in best_texts(model, prompt, 3, 4)]
    for sequence, score, (total, text) in zip(found.sequences, found.sequences_scores, wanted, strict=True):
        assert torch.equal(sequence[-len(text) :], text)
        assert abs(float(score) - total) < 1e-5


def test_prompts_may_be_read_in_chunks_or_without_a_cache_or_after_one(model):
    model, options = model.to(DEVICE), {"max_new_tokens": 6, "eos_token_id": None}
    batch = {name: tensor.to(DEVICE) for name, tensor in padded(texts()).items()}
    whole = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, prefill_chunk_size=3), whole)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), whole)
    cache = LamemoCache(model)
    model(batch["input_ids"][:, :7], attention_mask=batch["attention_mask"][:, :7], cache=cache)
    assert torch.equal(model.generate(**batch, **options, cache=cache), whole)
    torch.manual_seed(1)
    sampled = model.generate(**batch, **options, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (6, 17) and not torch.equal(sampled[0], sampled[1])


@pytest.mark.parametrize("memory", ["compressive", "continuous", "token", "lookahead"])
def test_training_has_the_cores_losses_and_gradients(memory):
    model, given = LamemoForCausalLM.of(tiny_decoder(FIRST[memory], dropout=0.0)).train(), texts()
    batch = padded(given)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    output.loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    core, lengths = model.model, torch.tensor(LENGTHS)
    tokens, state = padded(given, "right")["input_ids"], None
    total, extra = 0.0, 0.0
    for start in range(0, 11, core.segment_length):
        segment, left = tokens[:, start : start + core.segment_length], (lengths - start).clamp(0, 3)
        left = left.clamp(max=segment.size(1))
        features, state, losses = core(segment, state, left)
        target = tokens[:, start + 1 : start + 1 + segment.size(1)]
        wanted = torch.arange(start + 1, start + 1 + target.size(1)) < lengths[:, None]
        total = total + core.loss(features[:, : target.size(1)][wanted][None], target[wanted][None])
        extra = extra + sum(losses.values()) * left.sum() / lengths.sum()
    loss = total / (sum(LENGTHS) - 3) + extra
    loss.backward()
    close(output.loss, loss)
    for mine, parameter in zip(found, (p for p in model.parameters() if p.grad is not None), strict=True):
        close(mine, parameter.grad)
    items = model(**batch, labels=labels, num_items_in_batch=7).loss
    close(items, output.loss * (sum(LENGTHS) - 3) / 7)


@torch.no_grad()
@pytest.mark.parametrize("softmax", [{}, ADAPTIVE], ids=["full", "adaptive"])
def test_columns_and_labels(softmax):
    model = LamemoForCausalLM.of(tiny_decoder(**softmax))
    batch, whole = padded(texts()), None
    whole = model(**batch).logits
    close(model(**batch, logits_to_keep=2).logits, whole[:, -2:])
    close(model(**batch, logits_to_keep=torch.tensor([9, 1])).logits, whole[:, [9, 1]])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[2, 5:] = -100
    scores = model.model.score([texts()[0], texts()[1], texts()[2][:5]])
    close(model(**batch, labels=labels).loss, -torch.cat([score.log_probs for score in scores]).mean())
    loss, logits, cache = model(**batch, labels=labels, return_dict=False)
    assert loss.dim() == 0 and torch.equal(logits, whole) and isinstance(cache, LamemoCache)
    assert model(**batch, use_cache=False).cache is None
    nothing = model(batch["input_ids"], attention_mask=torch.zeros_like(batch["input_ids"]))
    assert not nothing.logits.isnan().any()


def test_tensors_that_no_file_has_come_back(tmp_path, monkeypatch):
    """As those of an own memory; memory that nobody had written was taken for them."""
    init = RecurrentMemory.__init__

    def with_tensors(self, config):
        init(self, config)
        self.register_buffer("table", torch.arange(1.0, 4.0), persistent=False)
        self.plain = torch.arange(1.0, 4.0)

    monkeypatch.setattr(RecurrentMemory, "__init__", with_tensors)
    LamemoForCausalLM.of(tiny_decoder(("recurrent", "shaw", "right"))).save_pretrained(tmp_path)
    memory = LamemoForCausalLM.from_pretrained(tmp_path).model.memory
    assert memory.table.tolist() == memory.plain.tolist() == [1, 2, 3]


@torch.no_grad()
def test_weights_in_several_files_replace_those_in_one(tmp_path):
    ids = texts()[0][None]
    for number, size in enumerate(("1TB", "2KB", "1TB")):
        model = LamemoForCausalLM.of(tiny_decoder(seed=number))
        model.save_pretrained(tmp_path, max_shard_size=size)
        close(LamemoForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def saved_core(folder, variant, encoding=None, words=None, **options):
    core = tiny_decoder(variant, words=17 if words is None else 4 + len(words), **options)
    core.tokenizer = Tokenizer([f"w{i}" for i in range(13)] if words is None else words, encoding)
    core.save(folder)
    return core


@pytest.mark.parametrize("memory", MEMORIES.names())
def test_a_folder_comes_back_to_the_last_bit(memory, tmp_path):
    """From the core's to transformers' and back, through Auto classes and through the command."""
    dtype = torch.float32 if memory in ("lookahead", "token") else torch.bfloat16
    softmax = ADAPTIVE if memory in ("compressive", "recurrent") else {"untie_output": memory == "token"}
    core = saved_core(tmp_path / "core", FIRST[memory], dtype=dtype, **softmax)
    main(["export", "--format", "transformers", str(tmp_path / "core"), str(tmp_path / "hf")])
    names = {"config.json", "dict.txt", "generation_config.json", "model.safetensors", "modeling_lamemo.py"}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == names | {"text.json", "tokenizer_config.json"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model) is LamemoForCausalLM and model.dtype == dtype and not model.training
    assert model.config.to_core() == core.config and model.config.vocab_size == 17
    model.save_pretrained(tmp_path / "again")  # without the tokenizer
    main(["import", "--format", "transformers", str(tmp_path / "hf"), str(tmp_path / "back")])
    for loaded in (model.model, *(LanguageModel.load(tmp_path / folder) for folder in ("hf", "again", "back"))):
        assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in core.named_parameters()]
        for (name, wanted), (other, found) in zip(core.state_dict().items(), loaded.state_dict().items(), strict=True):
            assert name == other and wanted.dtype == found.dtype and torch.equal(wanted, found), name
    assert torch.equal(model.model.score(torch.arange(9)).log_probs, core.score(torch.arange(9)).log_probs)
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        path.name for path in (tmp_path / "core").iterdir()
    }
    for name in ("config.json", "dict.txt", "text.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "core" / name).read_bytes(), name


def test_values_are_replaced_by_name(tmp_path):
    export_folder(tiny_decoder(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, mem_len=9, dtype=torch.float32)
    assert model.model.memory.slots == 9 and model.dtype == torch.float32
    assert AutoConfig.from_pretrained(tmp_path, hidden_size=10).decoder_embed_dim == 10
    changes = {"memory": "none", "memory_options": {}, "position_encoding": "transformer-xl"}  # as in the core
    assert AutoModelForCausalLM.from_pretrained(tmp_path, **changes).config.memory == "none"
    with pytest.raises(ValueError, match=r"has no use for the weight model.positions.ahead_position_bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **{**changes, "memory": "recurrent"})
    with pytest.raises(ValueError, match="--mem-len is -1"):
        AutoModelForCausalLM.from_pretrained(tmp_path, mem_len=-1)
    new = AutoModelForCausalLM.from_config(LamemoConfig(vocab_size=9, num_hidden_layers=1, memory="none", mem_len=0,
                                                        position_encoding="absolute"))  # fmt: skip
    assert new(torch.tensor([[2, 5]])).logits.shape == (1, 2, 9)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_layers": 3}))
    with pytest.raises(
        ValueError, match=r"has another shape of the weight model\.positions\.projection: it was saved "
    ):
        AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path)
    with pytest.raises(ValueError, match="the weights are those of another configuration"):
        LanguageModel.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    bias = "model.layers.1.feed_forward.fc1.bias"
    fewer = {name: weight for name, weight in weights.items() if name != bias}
    more = {**weights, "model.other": torch.zeros(1)}
    for changed, message in ((fewer, f"lacks the weight {bias}"), (more, "has no use for the weight model.other")):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"the model {message}: it was saved with another configuration"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


TOKENIZERS = [
    (TextEncoding(), [f"w{i}" for i in range(13)], ["w1 w2\n\nw3 new <unk>", "w4"]),
    (TextEncoding("none", "bytes"), list(BYTE_SYMBOLS.values()), ["caf\xe9 \t</s>\n ", "x"]),
    (TextEncoding("none", "characters"), [*"abc", "\u2581"], [" a\nb", "cc"]),
]


@pytest.mark.parametrize(("encoding", "words", "given"), TOKENIZERS, ids=["words", "bytes", "characters"])
def test_tokenizers_read_and_write_as_the_cores(encoding, words, given, tmp_path):
    core = saved_core(tmp_path / "core", FIRST["none"], encoding, words)
    export_folder(core, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(tokenizer) is LamemoTokenizer and len(tokenizer) == tokenizer.vocab_size == len(core.tokenizer)
    batch = tokenizer(given, return_tensors="pt", padding=True)
    ids = [[2, *core.tokenizer.encode(text).tolist()] for text in given]
    assert [row[mask.bool()].tolist() for row, mask in zip(*batch.values(), strict=True)] == ids
    assert batch["attention_mask"][1].tolist() == [0] * (len(ids[0]) - len(ids[1])) + [1] * len(ids[1])
    for text, row in zip(given, batch["input_ids"], strict=True):
        back = core.tokenizer.decode(core.tokenizer.encode(text))
        assert tokenizer.decode(row, skip_special_tokens=True) == back
        assert tokenizer.decode([*row.tolist(), 2, 1, 1], skip_special_tokens=True) == back
    assert tokenizer.decode(ids[0]) == "\n" + core.tokenizer.decode(core.tokenizer.encode(given[0]))
    tokenizer.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(given[0])["input_ids"] == ids[0]
    words = core.generate([given[1]], 5, temperature=0).words[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    found = model.generate(**tokenizer(given[1], return_tensors="pt"), max_new_tokens=5, eos_token_id=None)
    assert torch.equal(found[0, -5:], words)


def test_remote_code_needs_no_import_of_this_package(tmp_path, monkeypatch):
    """The classes are not registered here, as in a process that imports transformers alone."""
    core = saved_core(tmp_path / "core", FIRST["lookahead"])
    export_folder(core, tmp_path / "hf")
    for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, TOKENIZER_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", {})
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    for folder in ("hf", "again"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, trust_remote_code=True)
        found = model.generate(**tokenizer("w1 w2", return_tensors="pt"), max_new_tokens=6, eos_token_id=None)
        assert found[0].tolist() == [2, 5, 6, *core.generate(["w1 w2"], 6, temperature=0).words[0].tolist()]
        model.save_pretrained(tmp_path / "again")
        tokenizer.save_pretrained(tmp_path / "again")
    code = [(tmp_path / folder / "modeling_lamemo.py").read_text() for folder in ("hf", "again")]
    assert code[0] == code[1] and len(list((tmp_path / "again").glob("*.py"))) == 1


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs/transformers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    core = saved_core(tmp_path / "model", FIRST["lookahead"])
    export_folder(core, tmp_path / "hf-model")
    names: dict = {}
    for block in blocks:
        exec(block, names)
    mean = -core.score("w1 w2 w3 w4 w5\n" * 40).log_probs.mean()
    assert len(blocks) == 2 and abs(float(names["loss"]) / (names["document"].size(1) - 1) - float(mean)) < 1e-9
    assert capsys.readouterr().out.startswith("['w1 w2 w3")


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    export_folder(tiny_decoder(), tmp_path / "hf")
    with pytest.raises(ValueError, match=r"hf has no dict.txt: .* without a tokenizer"):
        AutoTokenizer.from_pretrained(tmp_path / "hf")


def test_a_folder_that_cannot_be_finished_is_left_as_it_was(tmp_path):
    core = saved_core(tmp_path / "core", FIRST["none"])
    export_folder(core, tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    core.tokenizer.symbols[-1] = "a\nb"
    with torch.no_grad():
        core.embed_tokens.table(0).zero_()
    with pytest.raises(ValueError, match="rename it"):
        export_folder(core, tmp_path / "hf")
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["export", "--format", "transformers", "{core}", "out", "--bpe", "bytes"],
            "--bpe bytes is for a checkpoint of",
        ),
        (["export", "--format", "transformers", "lost", "out"], "convert_checkpoint: there is no checkpoint lost, and"),
        (["export", "--format", "transformers", "{core}/dict.txt", "out"], "is a checkpoint of fairseq: pass --dict"),
        (
            ["export", "lost.pt", "out", "--dictionary", "d", "--bpe", "bytes"],
            "is for --format transformers: pass that",
        ),
        (["export", "lost.pt", "out"], "convert_checkpoint: there is no checkpoint lost.pt, and"),
        (["core", "lost.pt", "out", "--dictionary", "d"], "convert_checkpoint: there is no checkpoint lost.pt, and"),
        (
            ["core", "{core}/dict.txt", "out", "--dictionary", "d"],
            "--dictionary d: there is no such file, pass the dict",
        ),
        (["import", "--format", "transformers", "lost", "out"], "config.json is not there: pass a folder that"),
        (["import", "--format", "transformers", "{core}", "out", "--vocabulary", "v"], "is for --format released"),
    ],
)
def test_what_cannot_be_converted_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_core(tmp_path / "core", FIRST["none"])
    with pytest.raises(SystemExit, match=message) as refused:
        main([argument.format(core=tmp_path / "core") for argument in arguments])
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


@torch.no_grad()
def test_padding_alone_is_read_over(model):
    ids, words = torch.ones(1, 3, dtype=torch.int64), texts()[0][None]
    cache = LamemoCache(model)
    nothing = model(ids, attention_mask=torch.zeros_like(ids), cache=cache)
    assert nothing.logits.shape[:2] == (1, 3) and cache.get_seq_length() == 3
    mask = torch.cat([torch.zeros_like(ids), torch.ones_like(words)], dim=1)
    close(model(words, attention_mask=mask, cache=cache).logits, model(words).logits)
    with pytest.raises(ValueError, match="the cache has 1 sequences, and the input 2"):
        model(ids.repeat(2, 1), attention_mask=torch.zeros(2, 3), cache=cache)
    with pytest.raises(ValueError, match="attention_mask hides every word of the batch"):
        model.train()(ids, attention_mask=torch.zeros_like(ids), labels=ids)


def test_an_export_that_is_interrupted_leaves_no_mixture(tmp_path, monkeypatch):
    export_folder(tiny_decoder(), tmp_path)
    monkeypatch.setattr("lamemo_fairseq.huggingface.folder.put_in_place", lambda unfinished, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_folder(tiny_decoder(seed=3), tmp_path)
    with pytest.raises(ValueError, match=r"`model_type` key in its config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)

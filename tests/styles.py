"""Ten and more layouts of real chat templates, written for tests, with tiny tokenizers.

STYLES[name] = (template, control tokens, kind of tokenizer, what is written around an answer)

Kinds: "bytes" is byte-level BPE (GPT-2's kind), "prepend" and "first" put "\u2581" for blanks and
one before the text: before every stretch between control tokens (Llama-2), or before the first.
"""

from functools import lru_cache

EACH = "{% for m in messages %}"
CHATML = (EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
DEFAULT = ("{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n"
           "{% endif %}")
NO_SYSTEM = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
             "{% endif %}")
LLAMA2 = ("{% set ns = namespace(system='') %}" + EACH + "{% if m.role == 'system' %}"
          "{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
          "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ ns.system + m.content | trim }} "
          "[/INST]{% set ns.system = '' %}"
          "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}")
MISTRAL = ("{{ bos_token }}" + NO_SYSTEM + EACH + "{% if m.role == 'user' %}[INST] {{ m.content }} "
           "[/INST]{% else %}{{ m.content }}{{ eos_token }} {% endif %}{% endfor %}")
ZEPHYR = (EACH + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
# Thoughts are written into the last answer alone, empty ones too.
QWEN3 = ("{% set ns = namespace(asked=0) %}" + EACH + "{% if m.role == 'user' %}"
         "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
         "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
         + EACH + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
         "{% set parts = m.content.split('</think>') %}"
         "{% set thoughts = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 "
         "else '' %}"
         "{% if loop.index0 > ns.asked and (loop.last or thoughts) %}"
         "<think>\n{{ thoughts }}\n</think>\n\n{% endif %}{{ parts[-1].lstrip('\n') }}"
         "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
         "{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n"
         "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
         "{% endif %}{% endif %}")
GEMMA = ("{{ bos_token }}" + NO_SYSTEM + EACH + "<start_of_turn>"
         "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
         "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
PHI3 = (EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
LLAMA3 = ("{{ bos_token }}" + EACH + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
          "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
          "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
DEEPSEEK = ("{{ bos_token }}" + EACH + "{% if m.role == 'user' %}User: {{ m.content }}\n\n"
            "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
            "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}Assistant:{% endif %}")
# It asks for thoughts, and leaves them out of a finished answer.
R1 = ("{{ bos_token }}" + EACH + "{% if m.role == 'user' %}<|User|>{{ m.content }}"
      "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}"
      "{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}")
COMMAND = ("{{ bos_token }}" + EACH + "<|START|>{{ '<|BOT|>' if m.role == 'assistant' else "
           "'<|USER|>' if m.role == 'user' else '<|SYSTEM|>' }}{{ m.content }}<|END|>{% endfor %}"
           "{% if add_generation_prompt %}<|START|><|BOT|>{% endif %}")

IM = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]                     # end-of-text stands first
THINK = [*IM, "<think>", "</think>"]
STYLES = {
    "llama2": (LLAMA2, ["</s>", "<s>"], "prepend", (" ", " </s>")),
    "mistral": (MISTRAL, ["</s>", "<s>"], "first", ("", "</s>")),
    "zephyr": (ZEPHYR, ["</s>", "<s>"], "prepend", ("", "</s>")),
    "qwen2": (DEFAULT + CHATML, IM, "bytes", ("", "<|im_end|>")),
    "qwen3": (QWEN3, THINK, "bytes", ("<think>\n\n</think>\n\n", "<|im_end|>")),
    "gemma": (GEMMA, ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "first",
              ("", "<end_of_turn>")),
    "phi3": (PHI3, ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
             "prepend", ("", "<|end|>")),
    "llama3": (LLAMA3, ["<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>",
                        "<|start_header_id|>", "<|end_header_id|>"], "bytes", ("", "<|eot_id|>")),
    "smollm2": (DEFAULT + CHATML, [IM[1], IM[2], IM[0]], "bytes", ("", "<|im_end|>")),
    "deepseek": (DEEPSEEK, ["<|end|>", "<|begin|>"], "bytes", (" ", "<|end|>")),
    "r1": (R1, ["<|end|>", "<|begin|>", "<|User|>", "<|Assistant|>", "<think>", "</think>"],
           "bytes", ("", "<|end|>")),
    "command": (COMMAND, ["<|END|>", "<BOS>", "<|START|>", "<|USER|>", "<|BOT|>", "<|SYSTEM|>"],
                "first", ("", "<|END|>")),
}
NAMED_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|begin|>", "<BOS>")
TEXTS = ["User: What is the sun?\n\nAssistant: The sun is a star.\n\n\nWhat else is there?",
         "system\nBe helpful.\nuser\nWhy is it hot there?\nassistant\nThe core is.", "[INST] it"]


def make(name, folder):
    """The tokenizer of a style, in a folder as models have it."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast
    template, control, kind, _ = STYLES[name]
    bos = [token for token in control if token in NAMED_BOS]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend_of(kind), eos_token=control[0], bos_token=(bos or [None])[0])
    for token in control:
        special = token not in ("<think>", "</think>")
        # Phi-3's tokens eat the white space that follows them.
        added = AddedToken(token, special=special, normalized=False, rstrip=name == "phi3")
        fast.add_tokens([added], special_tokens=special)
    if bos:                                                      # as most that have one do
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", special_tokens=[(bos[0], fast.bos_token_id)])
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@lru_cache
def trained(kind):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    texts = TEXTS
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        letters, special = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()  # to train word by word
        backend.decoder = decoders.Sequence([
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0)])
        letters, special = [], ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        texts = [text.replace("\n", " ") for text in TEXTS]              # a line break is <0x0A>
    backend.train_from_iterator(texts * 3, trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False, initial_alphabet=letters))
    if kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind == "prepend":
        backend.pre_tokenizer = pre_tokenizers.Sequence([])
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence(steps)
    return backend.to_str()


def backend_of(kind):
    """A tokenizer of its own: control tokens are added to it."""
    import json
    from tokenizers import Tokenizer
    backend = json.loads(trained(kind))
    backend["added_tokens"] = []  # <0x0A> is no control token
    return Tokenizer.from_str(json.dumps(backend))

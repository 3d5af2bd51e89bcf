"""Any Hugging Face causal language model behind the GPT's call, and LoRA adapters on it.

A model's config cannot be trusted to say how it works, so four questions are put to the model
itself: do its tokens see later ones, is our output head its own, does it take our attention, and
if not, do sequences in one row see each other. The answers choose a slower path that is right, or
stop.

What transformers only warns of, such as weights that are missing or NaN, is an error here.
"""

import copy
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
from safetensors.torch import load_file

from model import GPT, Policy, attend, pieces_of
from plumbing.kernels import compile_head, fuse
from plumbing.reading import check_path, read_json, reading, tensors_of

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class HFPolicy(Policy):
    """transformers' causal LM as a policy. `lora`: train an adapter of that rank, nothing else."""

    rows_at_once = 64
    generation_config = None  # text of the source's generation_config.json, for `save`

    def __init__(self, lm, *, lora=0, seed=0):
        super().__init__()
        from transformers import GenerationConfig
        self.lm = lm.eval()  # no dropout: policy and reference must agree
        lm.generation_config = GenerationConfig()  # the folder's may hold penalties
        c = lm.config.get_text_config()
        self.vocab_size = c.vocab_size
        self.context = getattr(c, "max_position_embeddings", None)
        self.context = self.context or getattr(c, "n_positions", 1024)
        # What heads do after the product: Cohere multiplies, Granite divides, Gemma caps.
        self.scale = getattr(c, "logit_scale", None) or 1
        self.scale /= getattr(c, "logits_scaling", None) or 1
        self.softcap = getattr(c, "final_logit_softcapping", None)
        self.chunked = self._head_is_ours()
        self._check_causal()
        self.shares_prompts = self._takes_our_attention()
        self.flat = self.shares_prompts or self._keeps_apart()
        flash = "flash" in (lm.config._attn_implementation or "")
        costly = not (self.shares_prompts or flash)  # attention over a flat row of N takes N x N
        cpu = lm.device.type == "cpu"
        if self.flat and costly and cpu:
            self.token_budget = 512
        elif costly or cpu:
            self.token_budget = 2048
        # Not a submodule: its weights are those of lm.
        object.__setattr__(self, "peft", add_lora(lm, lora, seed) if lora else None)

    # --- four questions to the model

    @torch.no_grad()
    def _check_causal(self):
        """A later token must not change an earlier one's output."""
        ids, _ = self._probe_row(range(9))
        changed = ids.clone()
        changed[7:] = (ids[7:] + 1) % self.vocab_size
        if not same(self._run(ids[None])[0, :7], self._run(changed[None])[0, :7], 1e-5, 0.03):
            raise SystemExit(f"--model {self.lm.name_or_path}: its tokens see later ones, "
                             "a causal language model is needed")

    @torch.no_grad()
    def _takes_our_attention(self):
        """Do its layers call `flat_attention`? The row [a][x][y][z] must hold a, x y and x z.

        Then attention costs no more than these sequences, and a prompt x is computed once.
        """
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
        config = self.lm.config.get_text_config()
        if any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")):
            return False  # Llama 4 has it in its mask alone, which we replace
        AttentionInterface.register("flat", flat_attention)
        AttentionMaskInterface.register("flat", sdpa_mask)
        decoder = self.lm.get_decoder()
        before = decoder.config._attn_implementation
        pieces = pieces_of([5, (3, 2, 4)])
        ids, positions = self._probe_row(range(5), range(3), range(3, 5), range(3, 7))
        a, x, y, z = ids.split([5, 3, 2, 4])
        changed = torch.cat([a + 1, x, y + 1, z]) % self.vocab_size
        unmoved = [5, 6, 7, 10, 11, 12, 13]  # x and z
        texts = [a, torch.cat([x, y]), torch.cat([x, z])]
        alone = [self._run(text[None])[0] for text in texts]
        alone[2] = alone[2][3:]  # z
        try:
            decoder.set_attn_implementation("flat")
            row = self._run(ids[None], positions[None], pieces)[0]
            moved = self._run(changed[None], positions[None], pieces)[0]
            right = same(row, torch.cat(alone), 1e-3, 0.1)
            if right and torch.equal(row[unmoved], moved[unmoved]):
                return True
        except Exception:  # any model's own code runs here
            pass
        decoder.set_attn_implementation(before)
        return False

    @torch.no_grad()
    def _keeps_apart(self):
        """Do two sequences in one row, with restarting position_ids, give what they give alone?

        And does the second not notice a change of the first? That is exact in 16 bits too, where
        rounding would hide a small leak. A small sliding window is shorter than the sequences.
        """
        window = getattr(self.lm.config.get_text_config(), "sliding_window", None) or 0
        first = 5 + (window if window <= 512 else 0)
        whole = (self.context, self.context)
        if any(mask.shape[-2:] == whole for mask in self.lm.buffers()):
            return False  # a mask of its own (GPT-Neo): a flat row may be longer
        ids, positions = self._probe_row(range(first), range(first + 1))
        changed = ids.clone()
        changed[:first] = (ids[:first] + 1) % self.vocab_size
        try:
            row = self._run(ids[None], positions[None])[0]
            changed_row = self._run(changed[None], positions[None])[0]
        except TypeError:  # no position_ids at all
            return False
        alone = [self._run(part[None])[0] for part in ids.split([first, first + 1])]
        unmoved = same(row[first:], changed_row[first:], 1e-5, 0.0)
        return unmoved and same(row, torch.cat(alone), 1e-3, 0.1)

    @torch.no_grad()
    def _head_is_ours(self):
        """Does `head` of the decoder's output give the model's own logits?

        The output is enlarged more and more along the row, so that any cap shows.
        """
        decoder, head = self.lm.get_decoder(), self.lm.get_output_embeddings()
        if decoder is self.lm or head is None:
            return False
        seen = []

        def enlarge(module, args, out):
            factors = torch.logspace(-1, 2, 9).to(out.last_hidden_state)
            out.last_hidden_state = out.last_hidden_state * factors[:, None]
            seen.append(out.last_hidden_state)
            return out

        hook = decoder.register_forward_hook(enlarge)
        try:
            ids, _ = self._probe_row(range(9))
            logits = self.lm(input_ids=ids[None], use_cache=False).logits
        finally:
            hook.remove()
        if not seen:  # its forward goes another way
            return False
        ours = self._scale_and_cap(head(seen[0]))
        size = logits.abs().amax(-1, keepdim=True).clamp(min=1e-6)  # of each position
        return ours.shape == logits.shape and same(ours / size, logits / size, 1e-3, 0.02)

    def _probe_row(self, *ranges):
        """A flat row of made-up tokens that stand at these positions, and the positions."""
        device = next(self.lm.parameters()).device
        positions = torch.tensor([place for each in ranges for place in each], device=device)
        ids = (torch.arange(len(positions), device=device) * 7 + 3) % self.vocab_size
        return ids, positions

    # --- what model.Policy asks for

    def hidden(self, ids, positions, lengths, predict):
        """What `head` sees at the `predict` positions.   (M, d), or (M, V) if not `chunked`"""
        if self.shares_prompts:
            return self._run(ids[None], positions[None], pieces_of(lengths))[0][predict]
        if self.flat:
            return self._run(ids[None], positions[None])[0][predict]
        return self._padded(ids, list(lengths))[predict]

    def head(self, hidden):
        if not self.chunked:  # then hidden is the model's own logits
            return hidden
        return self._scale_and_cap(self.lm.get_output_embeddings()(hidden))

    def head_weight(self):
        head = self.lm.get_output_embeddings()
        if self.chunked and self.scale == 1 and self.softcap is None:
            if type(head) is nn.Linear and head.bias is None:
                return head.weight
        return None

    def _run(self, rows, positions=None, pieces=None):
        """The decoder's output, or the logits if the head is not ours.   (B, T) -> (B, T, d)"""
        inputs = {"input_ids": rows, "use_cache": False}  # with a cache sequences see each other
        if positions is not None:
            inputs["position_ids"] = positions
        if pieces is not None:
            # For flat_attention. In an object, into which --compile does not look.
            inputs["flat_row"] = SimpleNamespace(pieces=pieces)
            # A mask of 4 dimensions is taken as it is; without one an N x N mask would be made.
            inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rows.device)
        if self.chunked:
            return self.lm.get_decoder()(**inputs).last_hidden_state
        return self.lm(**inputs).logits

    def _padded(self, ids, lengths):
        """The same (N, d) from padded rows. Pads stand on the right, where nobody sees them."""
        sequences = ids.split(lengths)
        out = [None] * len(lengths)
        for group in groups_of_like_length(lengths):
            rows = [sequences[i] for i in group]
            hidden = self._run(nn.utils.rnn.pad_sequence(rows, batch_first=True))
            for i, row in zip(group, hidden):
                out[i] = row[:lengths[i]]
        return torch.cat(out)

    def _scale_and_cap(self, logits):
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def train(self, mode=True):
        """Never in training mode, which means dropout."""
        return super().train(False)

    def reference(self):
        """The policy as it was before training, without a copy of its weights."""
        return AdapterOff(self)

    def blocks(self, flag):
        from transformers.modeling_layers import GradientCheckpointingLayer
        found = [m for m in self.lm.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not found:
            raise SystemExit(f"--{flag}: transformers does not mark the layers of "
                             f"model_type {self.lm.config.model_type!r}")
        return found

    def compile_layers(self):
        from transformers import AttentionInterface
        compile_head()
        # Else it would be compiled again for the lengths of every batch.
        AttentionInterface.register("flat", torch.compiler.disable(flat_attention))
        for block in self.blocks("compile"):
            block.forward = fuse(block.forward)
        # With a cache, layers would be compiled one by one.
        self.write = torch.compiler.set_stance("force_eager")(self.write)

    def write(self, prompts, noise, stops, room, choose):
        """One batch of `generate`, by transformers' own, with a cache. Pads stand on the left."""
        width = max(len(prompt) for prompt in prompts)
        pads = [width - len(prompt) for prompt in prompts]
        ids = [[stops[0]] * pad + list(prompt) for pad, prompt in zip(pads, prompts)]
        ids = torch.tensor(ids, device=noise.device)
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        mask = torch.tensor(mask, device=noise.device)

        def only_our_choice(ids, logits):
            token = choose(logits, noise[:, ids.shape[1] - width])
            return torch.full_like(logits, -torch.inf).scatter(1, token[:, None], 0.0)

        grown = self.lm.generate(
            ids, attention_mask=mask, max_new_tokens=noise.shape[1], eos_token_id=stops,
            pad_token_id=stops[0], do_sample=False, logits_processor=[only_our_choice])
        responses = []
        for prompt, row in zip(prompts, grown[:, width:].tolist()):
            response = row[:room - len(prompt)]
            ends = [place for place, token in enumerate(response, 1) if token in stops]
            responses.append(response[:min(ends, default=len(response))])
        return responses

    def save(self, folder, *, eot=None, adapter=False, weights=None):
        """The whole model, an adapter merged into it; or, with `adapter`, the adapter alone.

        `weights`: by name, where this module holds only a shard of them.
        """
        if adapter:
            if self.sft_adapter:
                raise SystemExit(f"--save adapter: its base has {self.sft_adapter} merged into it, "
                                 "which no adapter folder can say; save it merged")
            self.peft.save_pretrained(folder, save_embedding_layers=False)
            return
        lm = self.lm
        if self.peft is not None:
            # A copy, because merging in and out again would leave rounding in frozen weights.
            lm = copy.deepcopy(self.peft).merge_and_unload()
        if weights:
            weights = {name.removeprefix("lm."): p for name, p in weights.items()}
        lm.save_pretrained(folder, state_dict=weights)
        file = Path(folder) / "generation_config.json"  # ours is empty; keep the source's
        file.unlink(missing_ok=True)
        if self.generation_config is not None:
            file.write_text(self.generation_config)


class AdapterOff:
    """A policy with its adapter switched off, without gradient. All else is the policy's own."""

    def __init__(self, policy):
        self.policy = policy

    def __call__(self, *args, **settings):
        return self._without_adapter(self.policy)(*args, **settings)

    def __getattr__(self, name):
        found = getattr(self.policy, name)
        if name in ("hidden", "generate"):  # `head` has no adapter
            return self._without_adapter(found)
        return found

    def _without_adapter(self, method):
        def call(*args, **settings):
            with torch.no_grad(), self.policy.peft.disable_adapter():
                return method(*args, **settings)
        return call

    def requires_grad_(self, mode=True):
        return self  # its weights are the policy's, which is being trained


class TokenClassifier(nn.Module):
    """transformers' sequence classifier, dressed as a causal LM with one logit per token.

    So `HFPolicy` takes it. Its own pooling is left out: it looks for a pad, and finds one in every
    end-of-text where both have the same id.
    """

    def __init__(self, folder, dtype, flag):
        super().__init__()
        from transformers import AutoModelForSequenceClassification
        with reading(f"--{flag} {folder}"):
            self.classifier, info = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, dtype=dtype, use_safetensors=True, local_files_only=True,
                output_loading_info=True)
            self.get_output_embeddings()  # an error where the head is called otherwise
        for name in sorted({*info["missing_keys"]} - {"score.weight"}):  # a new head may be made
            raise SystemExit(f"--{flag} {folder}: its files have no {name}")
        refuse_more_layers(self.classifier, info["unexpected_keys"], f"--{flag} {folder}")
        self.config = self.classifier.config
        self.name_or_path = str(folder)
        if self.config.pad_token_id == self.config.eos_token_id:
            self.config.pad_token_id = None

    @property
    def device(self):
        return self.classifier.device

    def get_decoder(self):
        return self.classifier.base_model

    def get_output_embeddings(self):
        return self.classifier.score

    def forward(self, **inputs):
        hidden = self.classifier.base_model(**inputs).last_hidden_state
        return SimpleNamespace(logits=self.classifier.score(hidden))


def flat_attention(module, query, key, value, attention_mask, scaling=None, flat_row=None,
                   **more):
    """What transformers' layers call: `model.attend` on a flat row.  (1, heads, N, d) x 3

    -> (1, N, heads, d). Without `flat_row` (padded rows, `generate`) it is transformers' own.
    """
    if flat_row is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        how = {"scaling": scaling, **more}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    for name in more.keys() - {"dropout", "position_ids", "use_cache"}:
        if more[name] is not None and more[name] is not False:  # a window, a cap, a bias
            raise TypeError(f"our attention has no {name}")
    group = query.shape[1] // key.shape[1]  # query heads that share a key
    query = query * (scaling * query.shape[-1] ** 0.5)  # attend divides by that root
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    # (N, heads, d) each, in one type: under autocast a rotation leaves float32.
    query, key, value = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    return attend(query, key, value, flat_row.pieces)[None], None


def same(a, b, wide, narrow):
    """Equal but for rounding: up to `narrow` in 16 bits, else up to `wide`."""
    tolerance = narrow if a.dtype in SIXTEEN_BITS else wide
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1))


def groups_of_like_length(lengths):
    """[3, 40, 38, 5] -> [[0], [3], [2, 1]]: at most an eighth of a padded group is padding."""
    groups, tokens = [], 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        tokens += lengths[i]
        if groups and lengths[i] * (len(groups[-1]) + 1) * 7 <= tokens * 8:
            groups[-1].append(i)
        else:
            groups.append([i])
            tokens = lengths[i]
    return groups


# --- folders --------------------------------------------------------

def local_folder(name, flag="model", *, trust_remote_code=False):
    """The folder of that name, or else the hub's files of that name, downloaded."""
    check_path(name, f"--{flag} {name}")
    is_hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name))
    if Path(name).is_dir() or not is_hub_name:
        return Path(name)
    from huggingface_hub import snapshot_download
    files = ["config.json", "*model*.safetensors", "*.safetensors.index.json", "*token*", "vocab*",
             "adapter_config.json", "generation_config.json", "merges.txt", "*.jinja"]
    if trust_remote_code:
        files.append("*.py")
    with reading(f"--{flag} {name}"):
        return Path(snapshot_download(str(name), allow_patterns=files, ignore_patterns=["*/*"]))


def adapter_base(folder, flag="model"):
    """The base model's folder or hub name if `folder` holds a peft adapter, else None."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    base = read_json(path, f"--{flag} {folder}").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise SystemExit(f"--{flag} {folder}: adapter_config.json: base_model_name_or_path is "
                         f"{base!r:.60}; expected a folder or a name of the hub")
    check_path(base, f"--{flag} {folder}: its base {base}")
    return base


def read_model_config(folder, flag="model"):
    """config.json of the model in `folder`, or of the base if it holds an adapter."""
    said = f"--{flag} {folder}"
    base = adapter_base(folder, flag)
    if base:
        folder = local_folder(base, flag)
        said += f": its base {base}"
    found = read_json(Path(folder) / "config.json", said)
    layers = found.get("num_hidden_layers")
    if isinstance(layers, int) and layers > 10_000:          # else they are made, one by one
        raise SystemExit(f"{said}: config.json: num_hidden_layers is {layers:,}")
    return found


# --- loading --------------------------------------------------------

def load_policy(folder, *, device="cpu", dtype=torch.float32, lora=0, seed=0,
                trust_remote_code=False, flag="model"):
    """The causal LM in `folder` or of that hub name: our GPT if we wrote it, else an `HFPolicy`.

    A folder with an adapter is its base with the adapter merged in, so that training and its
    reference start from both. `lora`: rank of a fresh adapter, which alone is then trained.
    """
    name = folder
    folder = local_folder(name, flag, trust_remote_code=trust_remote_code)
    base = adapter_base(folder, flag)
    source = folder
    if base:
        source = local_folder(base, flag, trust_remote_code=trust_remote_code)
    own = "nanokto" in read_model_config(folder, flag)
    if own and (lora or base):
        raise SystemExit(f"--{flag} {folder}: this project's small GPT takes no adapters (--lora)")
    for place in (source, folder):
        tensors_of(place, f"--{flag} {folder}")
    with reading(f"--{flag} {folder}"):
        if own:
            net = GPT.from_pretrained(folder, device=device, dtype=dtype)
        else:
            net = load_lm(source, dtype, trust_remote_code, flag).to(device)
        if base:
            net = merge_adapter(net, folder, flag)
        refuse_nan(net, f"--{flag} {folder}")
        if own:
            return net
        policy = HFPolicy(net, lora=lora, seed=seed)
        if (source / "generation_config.json").is_file():
            policy.generation_config = (source / "generation_config.json").read_text()
    if base:
        policy.sft_adapter = str(folder)
    if lora:
        # How the adapter's folder will name its base: a path good from anywhere, or the hub's name.
        name = Path(name).resolve() if Path(name).is_dir() else name
        policy.peft.active_peft_config.base_model_name_or_path = str(name)
    return policy


def refuse_nan(net, said):
    for name, p in net.named_parameters():
        if p.numel() and not all(end.isfinite() for end in p.detach().aminmax()):
            raise SystemExit(f"{said}: NaN or infinity in {name}")


def load_lm(folder, dtype, trust_remote_code, flag):
    """transformers' causal LM. Weights that it would leave at random numbers are an error."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available, logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # our one line replaces its tables
    lm, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True,
        ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code)
    misshapen = [name for name, found, wanted in info["mismatched_keys"]]
    for name in sorted([*info["missing_keys"], *misshapen]):
        raise SystemExit(f"--{flag} {folder}: its files have no {name} of the config's shape")
    refuse_more_layers(lm, info["unexpected_keys"], f"--{flag} {folder}")
    if dtype == torch.float64 and hasattr(lm, "set_experts_implementation"):
        lm.set_experts_implementation("eager")  # the fast ones have no float64
    if torch.cuda.is_available() and dtype in SIXTEEN_BITS and is_flash_attn_2_available():
        if lm._supports_flash_attn:  # flat rows then cost no N x N
            lm.set_attn_implementation("flash_attention_2")
    return lm


def refuse_more_layers(lm, unused, said):
    """Stop if an unused tensor is named like one of ours, but for the layer: layers.5, layers.0.

    Then the config has fewer layers than the files. Other unused tensors, a tied head, do no harm.
    """
    ours = set(lm.state_dict())
    for name in sorted(unused):
        twin = re.sub(r"\.\d+\.", ".0.", name, count=1)
        if twin != name and ours & {twin, f"{lm.base_model_prefix}.{twin}"}:
            raise SystemExit(f"{said}: its files have {name}, but its config has fewer layers")


# --- adapters: LoRA (Hu et al. 2021, arXiv 2106.09685), by the peft library 

def add_lora(lm, rank, seed=0):
    """W + 2 B A on every linear layer but the head. W is frozen; B = 0: it starts as the model.

    A is random and depends on `seed` alone, so that all processes have the same.
    """
    import peft
    without = None
    if lm.config.model_type in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"):
        without = ["conv1d", "out_proj"]  # Mamba's kernels take these weights, not the layers
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=0.0,
                             target_modules="all-linear", exclude_modules=without)
    devices = [lm.device] if lm.device.type == "cuda" else []
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return peft.get_peft_model(lm, config)


def merge_adapter(lm, folder, flag="model"):
    """lm with the adapter in `folder` added to its weights, all of them trainable."""
    import peft
    stored = load_file(Path(folder) / "adapter_model.safetensors")
    with warnings.catch_warnings(action="ignore"):  # what peft warns of is an error below
        model = peft.PeftModel.from_pretrained(lm, folder)
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(wanted.keys() ^ stored.keys()):
        raise SystemExit(f"--{flag} {folder}: the adapter does not fit its base: {name!r}")
    return model.merge_and_unload().requires_grad_(True)

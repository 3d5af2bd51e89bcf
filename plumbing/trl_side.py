"""TRL's side of bench.py, where it is installed: same weights, rows, mismatched responses."""

import torch

import model
from plumbing import gpt2, parallel

# How its steps are measured. gather: its head sees the labelled positions alone, as on a GPU.
VARIANTS = {"online": dict(cached=False, gather=False),
            "cached": dict(cached=True, gather=False),
            "online gather": dict(cached=False, gather=True),
            "cached gather": dict(cached=True, gather=True)}

# Columns of its collator, for each row of a unit: tokens, log-prob under the reference.
COLUMNS = {"kto": [("completion_ids", "ref_logps"), ("KL_completion_ids", "ref_KL_logps")],
           "dpo": [("chosen_ids", "ref_chosen_logps"), ("rejected_ids", "ref_rejected_logps")]}


def missing():
    """The line that says how to get TRL, or None where it is there."""
    try:
        from trl import KTOTrainer  # noqa: F401
    except ImportError as error:
        return (f"TRL cannot be imported ({error}): nanoKTO is measured alone. "
                "To compare: pip install trl==1.16.0")


def import_all():
    """What a trainer imports when it is first made."""
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    import trl.trainer.dpo_trainer  # noqa: F401
    import trl.trainer.kto_trainer  # noqa: F401


def use_gather(gather):
    import trl.trainer.utils
    trl.trainer.utils._use_triton = lambda device: gather


def word_tokenizer(vocab):
    """Numbers as words, "17 4 230 " <-> [17, 4, 230]: both sides read the same tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {str(i): i for i in range(vocab - 1)} | {"<end>": vocab - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Special tokens are found within words: one that is called "0" would cut "20" in two.
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


class Theirs:
    """TRL's trainer: its collator, forward, loss, backward and optimiser.

    cached: it is given the reference's log-probs in place of a model.
    """

    def __init__(self, case, folder, records, *, cached=False, gather=False):
        from accelerate.state import AcceleratorState
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, PrinterCallback
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
        AcceleratorState._reset_state(True)      # or the first trainer's precision is everybody's
        config, trainer = KTOConfig, KTOTrainer
        if case.loss == "dpo":
            config, trainer = DPOConfig, DPOTrainer

        load = AutoModelForCausalLM.from_pretrained
        policy = load(folder / "policy", dtype=torch.float32)
        reference = None
        if not cached:
            reference = load(folder / "ref", dtype=torch.float32)
        settings = config(
            output_dir=str(folder / "trl"), per_device_train_batch_size=case.batch_size, beta=0.1,
            gradient_checkpointing=False, bf16="--dtype=bf16" in case.flags,
            use_cpu=parallel.device.type == "cpu", report_to="none", learning_rate=1e-6,
            save_strategy="no", logging_strategy="no", disable_tqdm=True, num_train_epochs=1,
            dataloader_pin_memory=False, precompute_ref_log_probs=cached, max_length=None)
        use_gather(gather)
        self.columns = COLUMNS[case.loss]
        self.trainer = trainer(
            model=policy, ref_model=reference, args=settings,
            train_dataset=Dataset.from_list(records), processing_class=word_tokenizer(case.vocab))
        self.trainer.remove_callback(PrinterCallback)        # no lines in the middle of a table
        # As its train() does: bf16 is an autocast around the model's forward.
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.trainer.current_gradient_accumulation_steps = 1

    def inputs(self, ours, step, cached):
        """Our batch, mismatched responses included, through its collator."""
        examples = []
        table = ours.cached.table[ours.indices(step)].tolist()
        for unit, ref_logps in zip(ours.units(step), table):
            example = {"prompt_ids": unit[0].ids[:unit[0].n_prompt].tolist(),
                       "label": unit[0].desirable}
            for row, ref, (tokens, ref_column) in zip(unit, ref_logps, self.columns):
                example[tokens] = row.response.tolist()
                if cached:
                    example[ref_column] = ref
            examples.append(example)
        return self.trainer.data_collator(examples)

    def step(self, ours, step, *, cached, gather, update=True):
        trainer = self.trainer
        trainer.precompute_ref_logps = cached
        use_gather(gather)
        if trainer.optimizer is None:
            trainer.create_optimizer()
        trainer.optimizer.zero_grad()
        loss = trainer.training_step(self.model, self.inputs(ours, step, cached))
        if update:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            trainer.optimizer.step()
        return float(loss)


def apart(ours, theirs):
    """How far the losses of step 0 are apart, and the gradients: the worst tensor's, relative."""
    policy = ours.run.policy
    batch = next(ours.objective.batches(policy, 0))
    loss = 0.0
    for part, _ in parallel.deal(batch.units, policy.token_budget):
        losses = ours.objective.losses(ours.objective.measure(policy, batch, part))
        share = losses.sum() / batch.n
        share.backward()
        loss += float(share)
    loss_trl = theirs.step(ours, 0, cached=True, gather=True, update=False)
    gradients = {name: p.grad for name, p in theirs.model.named_parameters()}
    worst = 0.0
    for name, p in policy.named_parameters():
        mine = p.grad
        theirs_name = name.removeprefix("lm.")
        if isinstance(policy, model.GPT):
            theirs_name = "transformer." + name
            if name.endswith(gpt2.TRANSPOSED):          # as transformers stores it
                mine = mine.t()
        if mine.norm() > 0:
            difference = (mine - gradients[theirs_name]).norm()
            worst = max(worst, float(difference / mine.norm()))
    ours.optimizer.zero_grad()
    theirs.trainer.optimizer.zero_grad()
    return {"loss": loss, "loss_trl": loss_trl, "loss_apart": abs(loss / loss_trl - 1),
            "gradient_apart": worst}

"""TRL's side of bench.py, where TRL is installed: the same weights, rows and mismatched responses."""

import torch

import model
import train

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


def word_tokenizer(vocab):
    """Numbers as words, "17 4 230 " <-> [17, 4, 230]: both sides read the same tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {str(i): i for i in range(vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0",
                                   eos_token=str(vocab - 1))


def records_of(units):
    """Units as the text that they came from, without the end-of-text, which both sides add."""
    def text(ids):
        return "".join(f"{token} " for token in ids)

    records = []
    for unit in units:
        record = {"prompt": text(unit[0].ids[:unit[0].n_prompt])}
        answers = [text(row.response[:-1]) for row in unit]
        if len(unit) > 1:
            record |= {"chosen": answers[0], "rejected": answers[1]}
        else:
            record |= {"completion": answers[0], "label": unit[0].desirable}
        records.append(record)
    return records


class Theirs:
    """TRL's trainer: its collator, forward, loss, backward and optimiser.

    cached: it is given the reference's log-probs in place of a model.
    """

    def __init__(self, case, folder, records, device, *, cached=False):
        from accelerate.state import AcceleratorState
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, PrinterCallback
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
        AcceleratorState._reset_state(True)      # or the first trainer's precision is everybody's
        config, trainer = KTOConfig, KTOTrainer
        if case.loss == "dpo":
            config, trainer = DPOConfig, DPOTrainer

        def load(name):
            return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

        settings = config(
            output_dir=str(folder / "trl"), per_device_train_batch_size=case.batch_size, beta=0.1,
            gradient_checkpointing=False, bf16=case.dtype == "bf16", max_length=None,
            use_cpu=device.type == "cpu", report_to="none", learning_rate=1e-6,
            save_strategy="no", logging_strategy="no", disable_tqdm=True, num_train_epochs=1,
            dataloader_pin_memory=False, precompute_ref_log_probs=cached)
        self.columns = COLUMNS[case.loss]
        self.trainer = trainer(
            model=load("policy"), ref_model=None if cached else load("ref"), args=settings,
            train_dataset=Dataset.from_list(records), processing_class=word_tokenizer(case.vocab))
        self.trainer.remove_callback(PrinterCallback)        # no lines in the middle of a table
        # As its train() does: bf16 is an autocast around the model's forward.
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.trainer.current_gradient_accumulation_steps = 1

    def inputs(self, ours, step, cached):
        """Our batch, mismatched responses included, through its collator."""
        examples = []
        for i in ours.indices(step):
            unit = ours.units[i]
            example = {"prompt_ids": unit[0].ids[:unit[0].n_prompt].tolist(),
                       "label": unit[0].desirable}
            ref_logps = ours.reference_table[i].tolist()
            for row, ref, (tokens, ref_column) in zip(unit, ref_logps, self.columns):
                example[tokens] = row.response.tolist()
                if cached:
                    example[ref_column] = ref
            examples.append(example)
        return self.trainer.data_collator(examples)

    def step(self, ours, cached, step, update=True):
        trainer = self.trainer
        trainer.precompute_ref_logps = cached
        if trainer.optimizer is None:
            trainer.create_optimizer()
        trainer.optimizer.zero_grad()
        loss = trainer.training_step(self.model, self.inputs(ours, step, cached))
        if update:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            trainer.optimizer.step()
        return float(loss)

    def score(self, ours, step):
        self.trainer.compute_ref_log_probs(self.model, self.inputs(ours, step, False))


def apart(ours, theirs):
    """Both losses of step 0, and the largest relative difference of a tensor's gradient."""
    policy = ours.policy
    batch = next(ours.objective.batches(policy, 0))
    loss = 0.0
    for part, weight in train.parts_of(batch, policy, ours.case):
        losses = ours.objective.losses(ours.objective.measure(policy, batch, part))
        share = weight * losses.sum() / batch.n
        share.backward()
        loss += float(share)
    loss_trl = theirs.step(ours, True, 0, update=False)
    gradients = {name: p.grad for name, p in theirs.model.named_parameters()}
    worst = 0.0
    for name, p in policy.named_parameters():
        mine, name = p.grad, name.removeprefix("lm.")
        if isinstance(policy, model.GPT):
            mine = mine.t() if name.endswith(model.GPT.TRANSPOSED) else mine
            name = "transformer." + name
        if mine.norm() > 0:
            worst = max(worst, float((mine - gradients[name]).norm() / mine.norm()))
    ours.optimizer.zero_grad()
    theirs.trainer.optimizer.zero_grad()
    return {"loss": loss, "loss_trl": loss_trl, "gradient_apart": worst}

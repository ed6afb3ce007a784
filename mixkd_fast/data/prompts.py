"""How an instruction becomes the text that a causal language model answers."""

import re
from dataclasses import dataclass
from typing import Any

from mixkd_fast.configuration import Task
from mixkd_fast.errors import ConfigurationError, DataError

_HEADINGS = (
    "Below is a task with what it is about. Write an answer that does what the task asks.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)
_HEADINGS_WITHOUT_INPUT = (
    "Below is a task. Write an answer that does what it asks.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)


@dataclass(frozen=True)
class PromptStyle:
    """The text around instructions: templates, or the tokenizer's own chat template."""

    template: str
    template_without_input: str
    chat: bool = False

    @classmethod
    def of(cls, task: Task) -> "PromptStyle":
        """As the task section says."""
        if task.prompt_template is None:
            return cls(_HEADINGS, task.prompt_template_without_input or _HEADINGS_WITHOUT_INPUT, task.chat_template)
        return cls(task.prompt_template, task.prompt_template_without_input or task.prompt_template)

    def key(self, tokenizer: Any) -> str:
        """What the texts depend on, beside the rows. Raises: ConfigurationError without a chat template."""
        if not self.chat:
            return repr((self.template, self.template_without_input))
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigurationError(
                f'task.chat_template is true, but the tokenizer "{tokenizer.name_or_path}" has no chat template; '
                "leave it out, or use task.prompt_template"
            )
        return repr(tokenizer.chat_template)

    def pair(self, tokenizer: Any, prompt: str, about: str, response: str) -> tuple[str, str]:
        """Prompt and response as texts, the first of which ends where the model is to go on."""
        if not self.chat:
            template = self.template if about.strip() else self.template_without_input
            if about.strip() and "{input}" not in template:
                raise DataError(
                    f"task.prompt_template has no {{input}}, and the row with the instruction {prompt[:60]!r} has an "
                    "input: add {input}, or set task.prompt_column and task.response_column without task.input_column"
                )
            values = {"{prompt}": prompt, "{input}": about}
            # In one pass: an instruction may itself contain "{input}".
            return re.sub(r"\{prompt\}|\{input\}", lambda match: values[match[0]], template), response
        question = {"role": "user", "content": f"{prompt}\n\n{about}" if about.strip() else prompt}
        answer = {"role": "assistant", "content": response}
        before = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
        if not whole.startswith(before):
            raise DataError(
                "task.chat_template: what the tokenizer's template makes of question and answer does not begin with "
                "what it makes of the question alone; use task.prompt_template"
            )
        return before, whole[len(before) :]

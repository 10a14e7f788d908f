"""What a change of a model costs where no domain looks: loss on general text, and divergence on chat prompts."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from trl_interfere import Domain
from trl_interfere.evaluation.scorer import Scorer
from trl_interfere.models import load_model, load_tokenizer


SEQUENCES, LENGTH = 16, 512  # of general text
TOPICS = ("bread", "the moon", "a river", "chess", "winter", "trains", "honey", "a lighthouse", "football", "tea",
          "glass", "volcanoes", "maps", "a violin", "wolves", "the internet", "gold", "sleep", "bicycles",
          "stars")  # fmt: skip
# Of each kind twenty of the former, five of the latter: what is measured on, and what may be held.
QUESTIONS = ("Tell me something about {}.", "Why do people care about {}?", "Write a short poem about {}.",
             "What should a child know about {}?", "Give me three facts about {}.")  # fmt: skip
HELD_TOPICS = ("rice", "the sun", "a desert", "dice", "spring", "ships", "salt", "a bridge", "tennis", "coffee",
               "paper", "earthquakes", "clocks", "a drum", "foxes", "the radio", "iron", "dreams", "shoes",
               "clouds")  # fmt: skip
HELD_QUESTIONS = ("How would you explain {} to a friend?", "What is the history of {}?", "Write one sentence on {}.",
                  "What do most people get wrong about {}?", "Ask me a question about {}.")  # fmt: skip


class Price:
    """
    The text is the manual of Python, as its own help carries it (`pydoc_data.topics`); the prompts are questions, and
    the divergence KL(final ‖ model) is the mean over the tokens of the final model's greedy answers. `chat` is one
    more domain, of other questions on other things, to be held at the final model.
    """

    def __init__(self, final: str | Path, device: torch.device, answer_tokens: int = 24):
        self.tokenizer, model = load_tokenizer(str(final)), load_model(final).to(device)
        prompts = [[{"role": "user", "content": q.format(topic)}] for topic in TOPICS for q in QUESTIONS]
        held = [[{"role": "user", "content": q.format(topic)}] for q in HELD_QUESTIONS for topic in HELD_TOPICS]
        self.chat = Domain("chat", Dataset.from_dict({"prompt": held}))
        text = "\n\n".join(topics[name] for name in sorted(topics))
        ids = self.tokenizer(text)["input_ids"][: SEQUENCES * LENGTH]
        self.text = torch.tensor(ids).view(SEQUENCES, LENGTH).to(device)
        scorer = Scorer(self.tokenizer, max_new_tokens=answer_tokens, batch_size=100)
        answers = scorer.complete_ids(model, prompts)
        self.rows = [(scorer.encode_prompt(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
        self.expected = self._answers(model)

    @torch.no_grad()
    def of(self, model: PreTrainedModel) -> dict[str, float]:
        """Nats a token on the text, and of the divergence."""
        total = sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in self.text)
        pairs = zip(self.expected, self._answers(model), strict=True)
        kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
        return {"general_loss": total / SEQUENCES, "general_tokens": SEQUENCES * LENGTH, "chat_kl": float(kl.mean())}

    @torch.no_grad()
    def _answers(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Log probabilities at the tokens of each answer."""
        found = []
        for prompt, answer in self.rows:
            logits = model(
                input_ids=torch.tensor([prompt + answer], device=model.device), logits_to_keep=len(answer) + 1
            ).logits
            found.append(logits[0, :-1].float().log_softmax(-1))
        return found

"The reference of every layout: each response in a batch of its own, and the gradients of several batches together."
import torch

from rlhf_reward.packing import model_inputs, pad_comparisons
from rlhf_reward.tokens import tokenized_comparison


def alone(examples):
    "A batch for each response, of nothing else."
    batches = []
    for item in examples:
        for rest in item["rests"]:
            batches.append(pad_comparisons([tokenized_comparison(item["shared_prefix"] + rest, [[]])]))
    return batches


def rewards_and_gradients(model, batches):
    "Rewards of all batches, and the gradient of one loss over them together."
    model.zero_grad()
    rewards = torch.cat([model(**model_inputs(batch, model)) for batch in batches])
    weights = torch.linspace(-1, 1, len(rewards))[:, None]  # each reward counts on its own
    (rewards * weights).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return rewards.detach(), gradients

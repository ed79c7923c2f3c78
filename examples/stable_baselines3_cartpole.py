"""Reinforcement learning with stable-baselines3: PPO balances CartPole with a fused policy.

    python examples/stable_baselines3_cartpole.py

The policies of stable-baselines3 have Tanh between their layers, or what ``activation_fn`` says:
with ReLU, LeakyReLU, GELU, SiLU and Tanh they are fused.
"""

from __future__ import annotations

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

import fused_mlp


def make_agent(activation: type[nn.Module] = nn.Tanh) -> PPO:
    """Return an agent that has learned nothing yet."""
    return PPO(
        "MlpPolicy",
        "CartPole-v1",
        policy_kwargs={"activation_fn": activation},
        n_steps=512,
        batch_size=64,
        learning_rate=1e-3,
        seed=0,
        device="cpu",
    )


def train(agent: PPO, steps: int = 10_240) -> float:
    """Train an agent and return how many steps it balances the pole, 500 at most."""
    agent.learn(steps)
    mean, _ = evaluate_policy(agent, agent.get_env(), n_eval_episodes=5)
    return mean


if __name__ == "__main__":
    agent = make_agent()
    print(fused_mlp.fuse(agent.policy))
    print(f"balanced {train(agent):.0f} steps of 500")

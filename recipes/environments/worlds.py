"""Small worlds for the recipes beside this file: one for each interface."""

from __future__ import annotations

import random


def add(a: int, b: int) -> int:
    """Adds two whole numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


def multiply(a: int, b: int) -> int:
    """Multiplies two whole numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a * b


class Till:
    """A class with tools: the customer pays, the model gives change coin by coin.

    `reset` takes the row's columns and returns what is added to the prompt; each public method is a tool;
    `get_reward` is asked at the end.
    """

    def reset(self, price: int = 7, **row) -> str | None:
        self.owed = 10 - price
        return f"\nThe price is {price}, the customer gave 10. Give the change."

    def give(self, coin: int) -> str:
        """Gives one coin to the customer.

        Args:
            coin: its value: 1, 2 or 5
        """
        if coin not in (1, 2, 5):
            raise ValueError(f"there is no coin of {coin}")
        self.owed -= coin
        return f"{self.owed} left to give"

    def get_reward(self) -> float:
        return 1.0 if self.owed == 0 else 0.0


class GuessLetter:
    """A text environment: which of four letters is it? Two looks, and a hint between them."""

    actions = ("a", "b", "c", "d")

    def begin(self, row, seed=0):
        self.letter, self.left = random.Random(seed).choice(self.actions), 2
        return None

    def step(self, text):
        self.left -= 1
        guess = text.strip()[:1]
        if guess == self.letter:
            return "yes!", 1.0, True
        hint = "up" if guess < self.letter else "no,"
        return hint, 0.0, self.left == 0


def cell(env, observation, info) -> str:
    """Where one stands on a board of up to 26 cells, as one letter."""
    return chr(ord("a") + int(observation))

"""Rewards that can be checked: groups of answers, their advantages, and a loss that learns them."""

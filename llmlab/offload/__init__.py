"""Bigger than the card: a model's layers in three tiers (device, RAM, SSD), handed out one after another as they are wanted."""

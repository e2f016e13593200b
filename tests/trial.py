"""The config of a run of three steps, for what a command does before and after, and how it refuses."""

CONFIG = """
name = "trial"
steps = 3
model = { type = "new", alphabet = "0123456789+= ", hidden = 16, layers = 1, heads = 2, kv_heads = 1, context = 64 }
objective = { type = "dapo" }
buffer = { groups_per_step = 2, samples_per_group = 2, prompt_tokens = 16 }
generator = { sampling = { max_tokens = 8 } }
learner = { lr = 1e-3, token_budget = 64 }
tasks = [{ type = "jsonl", path = "rows.jsonl", chat = false, score = { type = "exact" }, held_out = 0 }]
"""

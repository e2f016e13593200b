"""Checks that stand in modules of their own explain themselves when they fail, as those in test files do."""

import pytest

pytest.register_assert_rewrite("engine_contract", "worker_contract")

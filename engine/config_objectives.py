"""What is trained, and how."""

from __future__ import annotations

from typing import Literal

from engine.config_section import Section


class NoCorrection(Section, frozen=True, tag="none"):
    """The ratio is taken against the behaviour log-probabilities themselves (two policies, no extra pass)."""


class DecoupledCorrection(Section, frozen=True, tag="decoupled"):
    """Three policies (AReaL): clip against the recomputed policy of the step's start, weight by old / behaviour."""


class TruncatedCorrection(Section, frozen=True, tag="truncated"):
    """As decoupled, the weight truncated at `cap`, per token or per sequence."""

    cap: float = 2.0
    level: Literal["token", "sequence"] = "token"


class IcepopCorrection(Section, frozen=True, tag="icepop"):
    """As decoupled, tokens whose weight lies outside [low, high] are masked out."""

    low: float = 0.5
    high: float = 5.0


Correction = NoCorrection | TruncatedCorrection | IcepopCorrection | DecoupledCorrection


class DapoObjective(Section, frozen=True, tag="dapo"):
    """DAPO; GRPO is `clip_high = 0.2`, `loss = "sequence"` and `dynamic_sampling = false`."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    normalize_std: bool = True
    loss: Literal["token", "sequence"] = "token"
    overlong_filter: bool = False
    correction: Correction = TruncatedCorrection()


class SftObjective(Section, frozen=True, tag="sft"):
    """Maximum likelihood of the rows' solutions: the cold start."""


class LengthAdaptive(Section, frozen=True):
    """VAPO's lambda of each response, 1 - 1 / (alpha length), clamped to [0, 1] (arXiv 2504.05118, eq. 5)."""

    alpha: float = 0.05


class PpoObjective(Section, frozen=True, tag="ppo"):
    """PPO with a critic; `lam_actor` and `lam_critic` are decoupled (VC-PPO, arXiv 2503.01491), equal by default.

    `whiten` gives the advantages of an update mean 0 and deviation 1; `positive_nll` is VAPO's mu, the weight of the
    likelihood of right answers. The critic's own settings are in `[critic]`.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    loss: Literal["token", "sequence"] = "sequence"
    overlong_filter: bool = False
    gamma: float = 1.0
    lam_actor: float | LengthAdaptive = 0.95
    lam_critic: float = 0.95
    whiten: bool = False
    positive_nll: float = 0.0
    correction: Correction = TruncatedCorrection()


class VcppoObjective(PpoObjective, frozen=True, tag="vcppo"):
    """PPO with VC-PPO's decoupled GAE: the critic learns from whole returns. Its pretraining is in `[critic]`."""

    loss: Literal["token", "sequence"] = "token"
    lam_critic: float = 1.0


class VapoObjective(PpoObjective, frozen=True, tag="vapo"):
    """VC-PPO with VAPO's clip-higher, length-adaptive lambda and likelihood of right answers (arXiv 2504.05118)."""

    clip_high: float = 0.28
    loss: Literal["token", "sequence"] = "token"
    lam_actor: float | LengthAdaptive = LengthAdaptive()
    lam_critic: float = 1.0
    positive_nll: float = 0.1


class CollectObjective(Section, frozen=True, tag="collect"):
    """Nothing is trained: a fixed policy's rollouts go into a log, for value pretraining."""


Objective = DapoObjective | PpoObjective | VcppoObjective | VapoObjective | CollectObjective | SftObjective

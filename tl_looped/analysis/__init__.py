"""Analyses of looped models, indexed by (loop, layer)."""

from __future__ import annotations

from .._old_names import moved
from .attention_distances import attention_distances
from .attention_stability import AttentionStability, attention_stability
from .exit_steps import ExitSteps, exit_steps, gate_pdf
from .fixed_points import FixedPoints, fixed_points
from .inference_stages import InferenceStages, inference_stages
from .injection_effect import InjectionEffect, injection_effect
from .limiting_behaviour import BehaviourRule, LimitingBehaviour, TokenBehaviour, limiting_behaviour
from .local_stability import LocalStability, local_stability
from .looped_floorplan import looped_floorplan
from .more_loops import MoreLoops, more_loops
from .output_neurons import output_neurons
from .path_independence import PathIndependence, path_independence
from .random_init import RandomInitSweep, random_init_sweep
from .state_similarity import state_similarity
from .step_geometry import StepGeometry, step_geometry
from .trajectories import Path, Trajectories, trajectories

__all__ = [
    "RandomInitSweep",
    "random_init_sweep",
    "AttentionStability",
    "attention_distances",
    "attention_stability",
    "looped_floorplan",
    "ExitSteps",
    "exit_steps",
    "gate_pdf",
    "LocalStability",
    "local_stability",
    "InjectionEffect",
    "MoreLoops",
    "injection_effect",
    "more_loops",
    "LimitingBehaviour",
    "BehaviourRule",
    "TokenBehaviour",
    "limiting_behaviour",
    "PathIndependence",
    "path_independence",
    "state_similarity",
    "StepGeometry",
    "step_geometry",
    "Path",
    "Trajectories",
    "trajectories",
    "FixedPoints",
    "fixed_points",
    "InferenceStages",
    "inference_stages",
    "output_neurons",
]


def __getattr__(name: str) -> object:
    return moved(__name__, name)

"""The job file as a tree of frozen values: the one place where a setting has a name and a default.

``load_spec`` reads YAML strictly (no duplicate keys, bounded size), applies ``--set`` overrides and
validates; every message names the field, what was found and what is allowed. ``${env:NAME}`` stays
a reference in the tree, so no dump, hash or log of a spec can hold a secret: ``resolve_env`` puts
the value in at the place of use.

``model.model`` may name a config fragment, ``configs/models/NAME.yaml``: its ``model`` and
``sampling`` keys then hold wherever the job does not say otherwise.

To read it, in this order:

job.py           the whole, and what must hold between its sections
section.py       what every section has in common; secrets.py: references, and what may not be written down
model.py, input.py, prompt.py, sampling.py, output.py, engine.py, cluster.py, schedule.py, notify.py
                 the section of that name; output.py has ``errors`` too
structured.py    what an answer must look like; labelling.py: classify, score, embed, review
processors.py    the user's own functions
document.py      YAML and ``--set``; fragments.py: models by name; loading.py: from the file to the spec
explanation.py   pydantic's faults in words for who wrote the file
"""

from b2batch.spec.cluster import ClusterSpec
from b2batch.spec.document import MAX_JOB_FILE_BYTES, apply_overrides, read_yaml, set_values
from b2batch.spec.engine import EngineSpec
from b2batch.spec.fragments import find_fragments, find_model, named_models
from b2batch.spec.input import InputSpec
from b2batch.spec.job import JobSpec, config_digest, env_references
from b2batch.spec.labelling import Label
from b2batch.spec.loading import load_spec, load_specs, parse_spec
from b2batch.spec.model import ModelSpec
from b2batch.spec.notify import Event, WebhookSpec
from b2batch.spec.processors import ProcessorSpec
from b2batch.spec.prompt import Example, Message, PromptSpec
from b2batch.spec.sampling import SamplingSpec
from b2batch.spec.secrets import mask_env, resolve_env
from b2batch.spec.structured import StructuredOutputsSpec

__all__ = [
    "MAX_JOB_FILE_BYTES",
    "ClusterSpec",
    "EngineSpec",
    "Event",
    "Example",
    "InputSpec",
    "JobSpec",
    "Label",
    "Message",
    "ModelSpec",
    "ProcessorSpec",
    "PromptSpec",
    "SamplingSpec",
    "StructuredOutputsSpec",
    "WebhookSpec",
    "apply_overrides",
    "config_digest",
    "env_references",
    "find_fragments",
    "find_model",
    "load_spec",
    "load_specs",
    "mask_env",
    "named_models",
    "parse_spec",
    "read_yaml",
    "resolve_env",
    "set_values",
]

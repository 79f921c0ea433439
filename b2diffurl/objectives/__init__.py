"""Objectives: functions of tensors, one number a (trajectory, step) pair.

An objective takes log_prob [N], old_log_prob [N] and advantage [N] and returns (loss [N], metrics), the metrics a dict of
detached tensors [N]. Means, weights and accumulation are the trainer's business.
"""

from b2diffurl.objectives.ddpo import ddpo

OBJECTIVES = {"ddpo": ddpo}

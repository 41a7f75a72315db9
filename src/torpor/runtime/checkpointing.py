"""Makes checkpoints: the cut while the agent waits anyway, then the commit while it runs on.

Order, and what a kill -9 between any two steps leaves (RECOVERY section 3; the names are crash points):

    hold delivery, BARRIER, note the log's head
        `checkpoint.cut`       the sandbox waits at the barrier; the next node's HELLO ends it
    mark the sandbox as paused, pause
        `checkpoint.paused`    the next node finds the mark and resumes the sandbox before it adopts it
    image to memory, workspace changes to staging
        `checkpoint.imaged`    as above; the staging directory is garbage
    resume, remove the mark, RELEASE
        `checkpoint.resumed`   the staging directory is garbage, nothing else happened
    packs and manifest into the store, fsynced
        `checkpoint.stored`    objects that no checkpoint names: garbage for `collect`
    one transaction: checkpoint row, event and head
        `checkpoint.committed` the checkpoint is there; the image stays cached in memory
"""

import logging

logger = logging.getLogger(__name__)

CUT_DEADLINE_SECONDS = 20
COMMITS_WAITING_MAX = 2

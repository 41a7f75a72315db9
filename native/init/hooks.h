/* Programs that the agent leaves in a directory of init's, to be run when something happens to its sandbox. */
#ifndef TORPOR_HOOKS_H
#define TORPOR_HOOKS_H

#include <sys/types.h>

enum { HOOKS_MAX = 64, HOOK_MS_MAX = 5000 };
#define HOOKS_AFTER_RESTORE "after-restore.d"
#define HOOKS_BEFORE_CHECKPOINT "before-checkpoint.d"
#define HOOKS_PATH "PATH=/usr/local/bin:/usr/bin:/bin:/run/torpor/bin"

/* Their names in order, each to be freed; how many. Hidden ones are none. */
unsigned hooks_list(const char *directory, char *names[HOOKS_MAX]);

/* Starts one in a session of its own, which dies with the caller; 0: it is no program, -1: errno says why not. */
pid_t hooks_start(const char *path, char *const environment[]);

#endif

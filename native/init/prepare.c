/* torpor-prepare: runs the agent's programs of before-checkpoint.d, one after another; that it ends says they are through.
 * Nothing is said on its socket. A program that takes too long is killed: the checkpoint is made in any case. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "hooks.h"
#include "worker.h"

enum { PATH_BYTES_MAX = 4096 };

static void block_sigchld(sigset_t *child) {
    sigemptyset(child);
    sigaddset(child, SIGCHLD);
    sigprocmask(SIG_BLOCK, child, NULL);
}

static void wait_for(pid_t pid, const sigset_t *child) {
    const struct timespec most = {.tv_sec = HOOK_MS_MAX / 1000, .tv_nsec = HOOK_MS_MAX % 1000 * 1000000L};
    /* One that was killed may have left its signal behind. */
    while (waitpid(pid, NULL, WNOHANG) == 0) {
        if (sigtimedwait(child, NULL, &most) >= 0) continue;
        kill(-pid, SIGKILL); /* its group may be there or not yet */
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        return;
    }
}

int prepare_main(int argc, char **argv) {
    char directory[PATH_BYTES_MAX], path[PATH_BYTES_MAX + 256], *names[HOOKS_MAX];
    char *environment[] = {HOOKS_PATH, NULL};
    if (argc < 2) return 2;
    snprintf(directory, sizeof directory, "%s/" HOOKS_BEFORE_CHECKPOINT, argv[1]);
    sigset_t child;
    block_sigchld(&child);
    unsigned count = hooks_list(directory, names);
    for (unsigned i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        pid_t pid = hooks_start(path, environment);
        if (pid > 0) wait_for(pid, &child);
        free(names[i]);
    }
    return 0;
}

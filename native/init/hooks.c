#include "hooks.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "init.h"

static int by_name(const void *one, const void *other) {
    return strcmp(*(char *const *)one, *(char *const *)other);
}

unsigned hooks_list(const char *directory, char *names[HOOKS_MAX]) {
    unsigned count = 0;
    DIR *dir = opendir(directory);
    if (!dir) return 0;
    struct dirent *entry;
    while (count < HOOKS_MAX && (entry = readdir(dir))) {
        if (entry->d_name[0] == '.') continue;
        char *name = strdup(entry->d_name);
        if (name) names[count++] = name;
    }
    closedir(dir);
    qsort(names, count, sizeof *names, by_name);
    return count;
}

static _Noreturn void become_hook(const char *path, char *const environment[]) {
    char *args[] = {(char *)path, NULL};
    child_reset_signals();
    int fd = open("/dev/null", O_RDWR);
    if (setsid() < 0 || fd < 0 || dup2(fd, 0) < 0 || dup2(fd, 1) < 0 || dup2(fd, 2) < 0) _exit(126);
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    execve(path, args, environment);
    _exit(127);
}

pid_t hooks_start(const char *path, char *const environment[]) {
    struct stat info;
    if (stat(path, &info) < 0 || !S_ISREG(info.st_mode) || access(path, X_OK) < 0) return 0;
    pid_t pid = fork();
    if (pid == 0) become_hook(path, environment);
    return pid;
}

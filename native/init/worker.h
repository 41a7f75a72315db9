/* The workers: this program under another name, one process for each thing that a person asks of the sandbox. Descriptor
 * 0 is a socket whose other end is a stream of the link; 1 and 2 are /dev/null. A worker that fails brings nothing down
 * but itself, and PID 1 stays as small as it is. */
#ifndef TORPOR_WORKER_H
#define TORPOR_WORKER_H

/* exec.c: runs a program with its standard streams on the socket */
int exec_main(int argc, char **argv);

/* copy.c: a file or a directory out of the sandbox, and into it */
int copy_out_main(int argc, char **argv);
int copy_in_main(int argc, char **argv);

/* prepare.c: runs the agent's programs that want to know of a checkpoint before it is made; argv[1] is RUN_DIR */
int prepare_main(int argc, char **argv);

#endif

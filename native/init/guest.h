/* torpor-guest: the sandbox's own API as a command, in every sandbox. */
#ifndef TORPOR_GUEST_H
#define TORPOR_GUEST_H

int guest_main(int argc, char **argv);

#endif

"""Nouns and rules, pure: nothing in here touches a socket, a file, a process or the clock."""

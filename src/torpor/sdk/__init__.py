"""What programs use Torpor with, from inside of a session: `torpor.agent` is `torpor.sdk.agent`."""

"""What all recipes share, whatever they train: the loop, the processes, the run folder, the display, the command.

A recipe describes itself by a ``recipe.Recipe`` and what is trained by a ``task.Task``; see ``README.md`` beside this
package. ``options`` and ``settings`` say what a user may choose, and ``command`` makes the command of it. ``job``
starts and watches the processes, ``trainer`` is the loop of one (``worker``) and ``schedule`` its learning rate;
``reports`` are what they say, ``board`` merges them and ``display`` shows them; ``checkpoint`` is the run folder and
``metrics`` what is known of the run.
"""

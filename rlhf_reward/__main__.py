"`python -m rlhf_reward` runs the command, for launchers that start modules: `accelerate launch -m rlhf_reward train`."
from rlhf_reward.cli import main

if __name__ == "__main__":
    main()

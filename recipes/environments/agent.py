"""An agent program as one would write it for any OpenAI endpoint: it asks for a sum, checks it, and asks again.

It knows nothing of training: the client finds the endpoint in OPENAI_BASE_URL and OPENAI_API_KEY.
"""

import json
import sys

from openai import OpenAI


def main() -> None:
    row = json.loads(sys.stdin.readline())
    client = OpenAI(max_retries=0, timeout=600)
    talk = row["prompt"]
    for _ in range(2):
        said = client.chat.completions.create(model="policy", messages=talk).choices[0].message.content or ""
        if row["answer"] in said:
            break
        talk = [*talk, {"role": "assistant", "content": said}, {"role": "user", "content": "no, try again"}]
    else:  # a second opinion, in a conversation of its own
        ask = [{"role": "user", "content": f"is it {said}? yes or no"}]
        client.chat.completions.create(model="policy", messages=ask)
    print(json.dumps({"reward": float(row["answer"] in said)}))


main()

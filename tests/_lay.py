import sys, time, torch, traceback
if __name__ == "__main__":
    from tests.harness.pool import join_alone, Pool
    join_alone()
    from tests.harness.compare import compare_to_one_rank
    torch.set_num_threads(1)
    world = int(sys.argv[1]); pool = Pool(world)
    for spec in sys.argv[2:]:
        words, _, layout = spec.partition("|")
        t=time.time()
        try:
            compare_to_one_rank(pool, words.split(), layout.split())
            print("ok  ", spec, f"{time.time()-t:.1f}", flush=True)
        except BaseException as e:
            print("FAIL", spec, str(e)[-1800:], flush=True)
    pool.close()

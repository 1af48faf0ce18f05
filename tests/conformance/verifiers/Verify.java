// Calls a server in each way that a user does, compares every answer byte by byte, and prints the outcomes as JSON.
//
// Verify ADDRESS FOLDER CALLS [AUTHORITY.pem]. grpc-java 1.41 or later; it compresses by gzip only.
import io.grpc.CallOptions;
import io.grpc.ClientCall;
import io.grpc.Channel;
import io.grpc.ClientInterceptors;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.netty.GrpcSslContexts;
import io.grpc.netty.NettyChannelBuilder;
import io.grpc.stub.ClientCalls;
import io.grpc.stub.MetadataUtils;
import java.io.ByteArrayInputStream;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Paths;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.TreeMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;

public class Verify {
  static final byte[] MARK = "########".getBytes(StandardCharsets.US_ASCII); // where a call's id goes
  static final String[] LARGE = {"large4", "large8", "large16"};
  static final long PATIENCE = 60000;
  static final Map<String, Map<String, Integer>> found = new TreeMap<>();
  static final Map<String, byte[]> files = new HashMap<>();
  static final AtomicInteger ids = new AtomicInteger(60000000);
  static Channel channel;

  static class Bytes implements MethodDescriptor.Marshaller<byte[]> {
    public InputStream stream(byte[] value) {
      return new ByteArrayInputStream(value);
    }

    public byte[] parse(InputStream stream) {
      try {
        return stream.readAllBytes();
      } catch (IOException error) {
        throw new RuntimeException(error);
      }
    }
  }

  static MethodDescriptor<byte[], byte[]> method(MethodDescriptor.MethodType type, String name) {
    return MethodDescriptor.<byte[], byte[]>newBuilder().setType(type)
        .setFullMethodName("inference.GRPCInferenceService/" + name)
        .setRequestMarshaller(new Bytes()).setResponseMarshaller(new Bytes()).build();
  }

  static final MethodDescriptor<byte[], byte[]> INFER = method(MethodDescriptor.MethodType.UNARY, "ModelInfer");

  static synchronized void note(String check, String outcome) {
    found.computeIfAbsent(check, key -> new TreeMap<>()).merge(outcome, 1, Integer::sum);
  }

  static void noteEnd(String check, Status status) {
    note(check, String.valueOf(status.getCode().value()));
  }

  static byte[] marked(String file, byte[] id) {
    byte[] copy = files.get(file).clone();
    for (int i = 0; i + MARK.length <= copy.length; ++i) {
      if (Arrays.equals(copy, i, i + MARK.length, MARK, 0, MARK.length)) {
        System.arraycopy(id, 0, copy, i, id.length);
        return copy;
      }
    }
    throw new IllegalArgumentException(file);
  }

  static byte[][] wanted(String name, String answer) {
    byte[] id = String.valueOf(ids.getAndIncrement()).getBytes(StandardCharsets.US_ASCII);
    return new byte[][] {marked(name + ".request", id), marked(name + "." + answer, id)};
  }

  static void unary(String check, String name, long timeout, long cancelAfter, CallOptions options) {
    byte[][] pair = wanted(name, "response");
    CallOptions limited = options.withDeadlineAfter(timeout, TimeUnit.MILLISECONDS);
    Future<byte[]> answer = ClientCalls.futureUnaryCall(channel.newCall(INFER, limited), pair[0]);
    try {
      if (cancelAfter >= 0) {
        Thread.sleep(cancelAfter);
        if (answer.cancel(true)) {
          note(check, "1");
          return;
        }
      }
      note(check, Arrays.equals(answer.get(), pair[1]) ? "answered" : "wrong");
    } catch (ExecutionException error) {
      noteEnd(check, Status.fromThrowable(error));
    } catch (InterruptedException error) {
      throw new RuntimeException(error);
    }
  }

  static void unary(String check, String name) {
    unary(check, name, PATIENCE, -1, CallOptions.DEFAULT);
  }

  static void stream(String check, List<String> names) {
    List<byte[][]> pairs = new ArrayList<>();
    for (String name : names) pairs.add(wanted(name, "streamed"));
    CountDownLatch over = new CountDownLatch(1);
    ClientCall<byte[], byte[]> call =
        channel.newCall(
            method(MethodDescriptor.MethodType.BIDI_STREAMING, "ModelStreamInfer"),
            CallOptions.DEFAULT.withDeadlineAfter(PATIENCE, TimeUnit.MILLISECONDS));
    call.start(
        new ClientCall.Listener<byte[]>() {
          int sent;
          int got;

          public void onReady() {
            while (sent < pairs.size() && call.isReady()) {
              call.sendMessage(pairs.get(sent++)[0]);
              if (sent == pairs.size()) call.halfClose();
            }
          }

          public void onMessage(byte[] answer) {
            note(check, got < pairs.size() && Arrays.equals(answer, pairs.get(got)[1]) ? "answered" : "wrong");
            ++got;
            call.request(1);
          }

          public void onClose(Status status, Metadata trailers) {
            if (!status.isOk()) {
              noteEnd(check, status);
            } else if (got != pairs.size()) {
              note(check, "ended after " + got);
            }
            over.countDown();
          }
        },
        new Metadata());
    call.request(1);
    try {
      over.await();
    } catch (InterruptedException error) {
      throw new RuntimeException(error);
    }
  }

  static void sideBySide(List<Runnable> jobs, int count) throws InterruptedException {
    AtomicInteger next = new AtomicInteger();
    List<Thread> threads = new ArrayList<>();
    for (int i = 0; i < count; ++i) {
      Thread thread = new Thread(() -> {
        for (int mine; (mine = next.getAndIncrement()) < jobs.size();) jobs.get(mine).run();
      });
      thread.start();
      threads.add(thread);
    }
    for (Thread thread : threads) thread.join();
  }

  static List<Runnable> smalls(String check, int count, CallOptions options) {
    List<Runnable> jobs = new ArrayList<>();
    for (int i = 0; i < count; ++i) {
      String name = "small" + i % 8;
      jobs.add(() -> unary(check, name, PATIENCE, -1, options));
    }
    return jobs;
  }

  static Metadata metadata() {
    byte[] all = new byte[256];
    for (int i = 0; i < 256; ++i) all[i] = (byte) i;
    Metadata found = new Metadata();
    found.put(Metadata.Key.of("x-trace", Metadata.ASCII_STRING_MARSHALLER), "a b,c");
    found.put(Metadata.Key.of("x-token-bin", Metadata.BINARY_BYTE_MARSHALLER), all);
    return found;
  }

  public static void main(String[] words) throws Exception {
    for (File file : new File(words[1]).listFiles()) files.put(file.getName(), Files.readAllBytes(file.toPath()));
    int calls = Integer.parseInt(words[2]);
    int colon = words[0].lastIndexOf(':');
    NettyChannelBuilder builder =
        NettyChannelBuilder.forAddress(words[0].substring(0, colon), Integer.parseInt(words[0].substring(colon + 1)))
            .maxInboundMessageSize(Integer.MAX_VALUE);
    if (words.length > 3) {
      builder.sslContext(GrpcSslContexts.forClient().trustManager(new File(words[3])).build());
    } else {
      builder.usePlaintext();
    }
    ManagedChannel connection = builder.build();
    channel = ClientInterceptors.intercept(connection, MetadataUtils.newAttachHeadersInterceptor(metadata()));
    Random random = new Random(1);
    CallOptions plain = CallOptions.DEFAULT, gzip = plain.withCompression("gzip");
    sideBySide(smalls("unary", calls, plain), 8);
    List<Runnable> jobs = smalls("gzip", calls / 4, gzip);
    jobs.add(() -> unary("gzip", "large4", PATIENCE, -1, gzip));
    sideBySide(jobs, 8);
    jobs = new ArrayList<>();
    for (int i = 0; i < 9; ++i) {
      String name = LARGE[i % 3];
      jobs.add(() -> unary("large", name));
    }
    sideBySide(jobs, 3);
    List<String> names = new ArrayList<>();
    for (int i = 0; i < calls / 4; ++i) names.add("small" + i % 8);
    sideBySide(Collections.nCopies(4, () -> stream("stream", names)), 4);
    List<String> twice = new ArrayList<>(Arrays.asList(LARGE));
    twice.addAll(Arrays.asList(LARGE));
    if (files.containsKey("large4.streamed")) {
      sideBySide(Collections.nCopies(2, () -> stream("large stream", twice)), 2);
    }
    jobs = smalls("beside deadlines", 80, plain);
    for (int i = 0; i < 40; ++i) {
      int timeout = 1 + random.nextInt(20);
      jobs.add(() -> unary("deadlines", "slow", timeout, -1, plain));
    }
    Collections.shuffle(jobs, random);
    sideBySide(jobs, 8);
    jobs = smalls("beside cancels", 80, plain);
    String[] kinds = {"slow", "large4", "small0"};
    for (int i = 0; i < 120; ++i) {
      int number = i;
      jobs.add(() -> unary("cancels", kinds[number % 3], PATIENCE, number % 6, plain));
    }
    Collections.shuffle(jobs, random);
    sideBySide(jobs, 8);
    String[][] wrong = {
      {"missing model", "missing", "ModelInfer"},
      {"missing method", "missing", "NoMethod"},
      {"oversized", "oversized", "ModelInfer"},
    };
    for (String[] parts : wrong) {
      MethodDescriptor<byte[], byte[]> called = method(MethodDescriptor.MethodType.UNARY, parts[2]);
      try {
        ClientCalls.blockingUnaryCall(channel, called, plain, files.get(parts[1] + ".request"));
        note(parts[0], "answered");
      } catch (RuntimeException error) {
        noteEnd(parts[0], Status.fromThrowable(error));
      }
    }
    sideBySide(smalls("after all", 80, plain), 8);
    List<String> checks = new ArrayList<>();
    found.forEach((check, outcomes) -> {
      List<String> counts = new ArrayList<>();
      outcomes.forEach((outcome, count) -> counts.add("\"" + outcome + "\": " + count));
      checks.add("\"" + check + "\": {" + String.join(", ", counts) + "}");
    });
    System.out.println("{" + String.join(", ", checks) + "}");
    System.exit(0);
  }
}
